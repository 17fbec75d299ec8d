"""Virtqueues over guest memory, both sides of them.

The device's side is :class:`SplitQueue` or :class:`PackedQueue`, the driver's :class:`SplitDriver`
or :class:`PackedDriver`; all work in a :class:`GuestMemory`. Rings and memory are the guest's and
hostile: what it does wrong raises a :class:`~vring.errors.RingError`. Other Cython extensions
``cimport vring`` (see get_include).

Compiled modules, and numpy with them, are loaded when a name of theirs is first used: what needs
only the errors does not pay for them.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from vring.errors import (
    AddressError,
    AvailableIndexError,
    BufferAddressError,
    ChainError,
    ChainOrderError,
    DescriptorFlagsError,
    Error,
    HeadError,
    IndirectError,
    LocalMisuseError,
    MemoryLostError,
    MemoryMapError,
    QueueFullError,
    RingError,
    UsedRingError,
    VringError,
)
from vring.lazy import exports
from vring.notification import NotificationData

if TYPE_CHECKING:
    from vring import _layout as layout
    from vring._backlog import Backlog
    from vring._chains import Batch, Chain
    from vring._core import RECORD_SIZE, VirtQueue
    from vring._dirty import LOG_PAGE, DirtyLog
    from vring._driver import Driver, need_event
    from vring._guard import MemoryWatch
    from vring._memory import GuestMemory, Region
    from vring._notify import Drained, drain, notify
    from vring._packed import PackedQueue
    from vring._packed_driver import PackedDriver
    from vring._pump import (
        Flow,
        FlowCounters,
        FlowEvent,
        Pump,
        move_queues,
    )
    from vring._recorded import receive_recorded, recorded, send_recorded, set_record
    from vring._shared_records import SharedRecords
    from vring._split import SplitQueue
    from vring._split_driver import SplitDriver

__all__ = [
    "SplitQueue",
    "PackedQueue",
    "VirtQueue",
    "RECORD_SIZE",
    "SharedRecords",
    "Batch",
    "Chain",
    "SplitDriver",
    "PackedDriver",
    "Driver",
    "GuestMemory",
    "Region",
    "MemoryWatch",
    "DirtyLog",
    "LOG_PAGE",
    "need_event",
    "NotificationData",
    "notify",
    "drain",
    "Drained",
    "send_recorded",
    "receive_recorded",
    "set_record",
    "recorded",
    "layout",
    "Pump",
    "Flow",
    "FlowEvent",
    "FlowCounters",
    "move_queues",
    "Backlog",
    "get_include",
    "Error",
    "VringError",
    "LocalMisuseError",
    "QueueFullError",
    "MemoryMapError",
    "AddressError",
    "RingError",
    "AvailableIndexError",
    "HeadError",
    "ChainError",
    "ChainOrderError",
    "IndirectError",
    "BufferAddressError",
    "DescriptorFlagsError",
    "MemoryLostError",
    "UsedRingError",
]

#: The version of the package `vring`, which holds vring_serial too (PEP 440).
__version__ = "0.1.0.dev0"


def get_include() -> str:
    """Return the directory to put into Cython's include_path for ``cimport vring``."""
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


if not TYPE_CHECKING:  # type checkers take the imports above
    _get, __dir__ = exports(
        __name__,
        {
            "vring._split": "SplitQueue",
            "vring._packed": "PackedQueue",
            "vring._core": "RECORD_SIZE VirtQueue",
            "vring._shared_records": "SharedRecords",
            "vring._backlog": "Backlog",
            "vring._chains": "Batch Chain",
            "vring._split_driver": "SplitDriver",
            "vring._packed_driver": "PackedDriver",
            "vring._driver": "Driver need_event",
            "vring._memory": "GuestMemory Region",
            "vring._dirty": "DirtyLog LOG_PAGE",
            "vring._guard": "MemoryWatch",
            "vring._notify": "notify drain Drained",
            "vring._pump": "Pump Flow FlowEvent FlowCounters move_queues",
            "vring._recorded": "send_recorded receive_recorded set_record recorded",
        },
    )

    def __getattr__(name: str) -> object:
        try:
            if name == "layout":
                return importlib.import_module("vring._layout")
            return _get(name)
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("vring._"):
                raise
            raise ImportError(
                f"{error.name} is not compiled: run `make build` in the source tree, or leave it"
            ) from error
