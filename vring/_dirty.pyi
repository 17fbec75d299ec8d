from typing import final

from typing_extensions import Buffer

LOG_PAGE: int

__pyx_capi__: dict[str, object]

@final
class DirtyLog:
    def __init__(self, buffer: Buffer) -> None: ...
    @property
    def buffer(self) -> Buffer: ...
    @property
    def end(self) -> int: ...
    def mark(self, guest_addr: int, length: int) -> None: ...
    def take(self, guest_addr: int, length: int, page_size: int = ...) -> bytearray: ...
