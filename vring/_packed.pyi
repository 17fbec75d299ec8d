from typing import final

from vring._core import VirtQueue
from vring._memory import GuestMemory

@final
class PackedQueue(VirtQueue):
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
        used_index: int | None = None,
        name: str = "queue",
    ) -> None: ...
