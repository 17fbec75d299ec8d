import enum

__pyx_capi__: dict[str, object]

class Drained(enum.Enum):
    READ = "read"
    EMPTY = "empty"
    ENDED = "ended"

def notify(fd: int) -> None: ...
def drain(fd: int) -> Drained: ...
