"""Where the configuration of this process, and the process itself, come from."""

from __future__ import annotations

from dataclasses import dataclass

from vring_serial.config.inputs import Inputs
from vring_serial.service.succession import Arrival, arrive


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a process.

    Attributes:
        inputs: what its configuration is read from.
        arrival: in an upgrade, what the code before left; None: the process was simply started.
    """

    inputs: Inputs
    arrival: Arrival | None


def find_origin() -> Origin:
    """Return the origin of this process. Raises StateError; see ``arrive``."""
    arrival = arrive()
    return Origin(Inputs(None if arrival is None else arrival.state.inputs), arrival)
