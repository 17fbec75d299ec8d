from typing import final

from vring._core import VirtQueue

@final
class SplitQueue(VirtQueue): ...
