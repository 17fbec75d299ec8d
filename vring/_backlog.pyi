from typing import final

from typing_extensions import Buffer

@final
class Backlog:
    def __init__(self, area: Buffer) -> None: ...
    @property
    def data(self) -> bytes: ...
    def replace(self, data: Buffer) -> bool: ...
    def write_to(
        self, fd: int, *, kept: bool = False, relay: tuple[int, int] | None = None
    ) -> int: ...

__pyx_capi__: dict[str, object]
