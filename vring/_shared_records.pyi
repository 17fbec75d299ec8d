from typing import final

from typing_extensions import Buffer

@final
class SharedRecords(Buffer):
    def __init__(self, fd: int, offset: int, count: int) -> None: ...
    @property
    def count(self) -> int: ...
    def record(self, index: int) -> memoryview: ...
