"""Where the configuration of this process, and the process itself, come from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from vring_serial import activation
from vring_serial.config.inputs import Inputs
from vring_serial.errors import ConfigError
from vring_serial.service.manager_store import is_stored
from vring_serial.service.succession import Arrival, arrive
from vring_serial.service.systemd import listen_fds


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a process.

    Attributes:
        inputs: what its configuration is read from.
        stored: descriptors that the service manager kept for us, by name.
        arrival: in an upgrade, what the code before left; None: the process was simply started.
    """

    inputs: Inputs
    stored: Mapping[str, list[int]]
    arrival: Arrival | None


def find_origin() -> Origin:
    """Return the origin of this process, and note the sockets that it was given.

    Raises StateError (see ``arrive``), ConfigError (see ``listen_fds``).
    """
    arrival = arrive()
    stored: dict[str, list[int]] = {}
    passed = list(arrival.state.sockets) if arrival else []
    for name, fd in [] if arrival else listen_fds(os.environ):
        if is_stored(name):
            stored.setdefault(name, []).append(fd)
        else:
            passed.append(fd)
    try:
        activation.provide(passed)
    except ValueError as error:
        raise ConfigError(str(error), "LISTEN_FDS") from None
    return Origin(Inputs(None if arrival is None else arrival.state.inputs), stored, arrival)
