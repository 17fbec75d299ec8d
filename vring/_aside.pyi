from collections.abc import Iterable

from typing_extensions import Buffer

def close_aside(fds: Iterable[int], begun: Buffer) -> int: ...
