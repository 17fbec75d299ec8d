from typing import final

from vring._driver import Driver

@final
class PackedDriver(Driver):
    @staticmethod
    def layout(size: int) -> tuple[int, int, int]: ...
