import enum
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import NamedTuple, Self, final

from typing_extensions import Buffer

from vring._backlog import Backlog
from vring._core import VirtQueue
from vring._memory import GuestMemory
from vring.errors import RingError

class FlowEvent(enum.IntEnum):
    PEER_EOF = 0
    PEER_ERROR = 1
    RING_BROKEN = 2
    OVERFLOW = 3
    INEXACT = 4
    UNLOGGED = 5

class FlowCounters(NamedTuple):
    bytes: int
    chains: int
    batches: int
    kicks: int
    calls: int
    calls_saved: int
    throttled_ns: int
    dropped: int
    unlogged: int

@final
class Flow:
    def __init__(self, *args: object, **kwargs: object) -> None: ...
    @property
    def queue(self) -> VirtQueue: ...
    @property
    def attached(self) -> bool: ...
    @property
    def counters(self) -> FlowCounters: ...
    def detach(self, complete: bool = True) -> bytes: ...

@final
class Pump:
    def __init__(self, busy_poll_us: int = 0) -> None: ...
    def __del__(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
        /,
    ) -> None: ...
    @property
    def busy_poll_us(self) -> int: ...
    @property
    def event_fd(self) -> int: ...
    def dispatch(self) -> None: ...
    def guest_to_host(
        self,
        queue: VirtQueue,
        *,
        write_fd: int,
        kick_fd: int,
        call_fd: int,
        on_event: Callable[[FlowEvent, int | RingError | None], object],
        lossy: bool = False,
        backlog: int | Backlog = 1 << 20,
        residue: Buffer = b"",
        kept: bool = False,
        relay: tuple[int, int] | None = None,
        log_fd: int = -1,
    ) -> Flow: ...
    def host_to_guest(
        self,
        queue: VirtQueue,
        *,
        read_fd: int,
        kick_fd: int,
        call_fd: int,
        on_event: Callable[[FlowEvent, int | RingError | None], object],
        kept: bool = False,
        relay: tuple[int, int] | None = None,
    ) -> Flow: ...
    def close(self) -> None: ...
    def halt(self) -> None: ...

def move_queues(queues: Iterable[VirtQueue], memory: GuestMemory) -> list[VirtQueue]: ...
