from typing import Self, final

from typing_extensions import Buffer

@final
class SharedRecords(Buffer):
    def __new__(cls, fd: int, offset: int, count: int) -> Self: ...
    @property
    def count(self) -> int: ...
    def record(self, index: int) -> memoryview: ...
