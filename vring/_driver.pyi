from collections.abc import Iterable, Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import disjoint_base

from vring._memory import GuestMemory

def need_event(event: int, after: int, before: int) -> bool: ...

@disjoint_base
class Driver:
    def __init__(self, *args: object, **kwargs: object) -> None: ...
    @property
    def memory(self) -> GuestMemory: ...
    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def num_free(self) -> int: ...
    @property
    def event_idx(self) -> bool: ...
    @property
    def indirect(self) -> bool: ...
    @property
    def in_order(self) -> bool: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def avail_index(self) -> int: ...
    @property
    def used_index(self) -> int: ...
    def add(
        self,
        readable: Iterable[tuple[int, int]],
        writable: Iterable[tuple[int, int]],
        *,
        indirect_at: int | None = None,
    ) -> int: ...
    def add_many(
        self,
        addresses: NDArray[np.uint64] | Sequence[int],
        lengths: NDArray[np.uint32] | Sequence[int],
        writable: bool,
    ) -> int: ...
    def publish(self) -> bool: ...
    def get_used(self, limit: int = 0) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]: ...
    def enable_notifications(self, after: int = 1) -> bool: ...
    def disable_notifications(self) -> None: ...
    def notification_data(self, queue: int) -> int: ...
    def reset(self) -> None: ...

@final
class SplitDriver(Driver):
    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        event_idx: bool = False,
        indirect: bool = False,
        in_order: bool = False,
        index: int = 0,
        name: str = "driver",
    ) -> None: ...
    @staticmethod
    def layout(size: int) -> tuple[int, int, int]: ...

@final
class PackedDriver(Driver):
    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        desc: int,
        avail: int,
        used: int,
        *,
        event_idx: bool = False,
        indirect: bool = False,
        in_order: bool = False,
        index: int = 0x8000,
        name: str = "driver",
    ) -> None: ...
    @staticmethod
    def layout(size: int) -> tuple[int, int, int]: ...
