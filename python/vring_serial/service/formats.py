"""Which states a worker may find in its journal: all that this version understands."""

from __future__ import annotations

from typing import Any

from vring_serial.device.console.state import CONSOLE
from vring_serial.errors import StateError
from vring_serial.saving import MAGIC, StateFormat, saved_kind
from vring_serial.service.changes import CHANGES
from vring_serial.service.journal import LAYOUT_VERSION, Journal
from vring_serial.transport.vfio_user.state import CLIENT, QUEUES, REGIONS, REGISTERS, TABLE
from vring_serial.transport.vhost_user.state import FRONTEND

_ALL: tuple[StateFormat[Any], ...] = (
    *(CONSOLE, FRONTEND, CLIENT, REGIONS, REGISTERS, TABLE, QUEUES),
    CHANGES,
)
_KNOWN = {form.kind: form for form in _ALL}
#: What this version writes, as one text: a version with the same can go on from it.
FORMATS = ",".join(
    [f"journal {LAYOUT_VERSION}", *sorted(f"{form.kind} {form.version}" for form in _ALL)]
)
#: How often a journal is looked at, that is being written to meanwhile.
_LOOKS = 3


def check_journal(fd: int) -> None:
    """Check that all of a journal is understood, which its worker may be writing to.

    Raises StateError that names the section and what is wrong.
    """
    for look in range(1, _LOOKS + 1):
        try:
            with Journal(fd, read_only=True) as journal:
                for name in journal.sections:
                    _check(name, journal.read(name))
        except StateError:
            if look == _LOOKS:
                raise
        else:
            return


def _check(name: str, state: bytes | None) -> None:
    if not state or not state.startswith(MAGIC):
        return  # a few bytes of a host end's own
    try:
        kind = saved_kind(state)
        if kind not in _KNOWN:
            raise StateError(f"it is the state of {kind!r}, which is not known")
        _KNOWN[kind].unpack(state)
    except StateError as error:
        raise StateError(f"{name}: {error}") from None
