from collections.abc import Mapping

NO_NEW_PRIVILEGES: int
BOUNDING: int
CAPABILITIES: int
LANDLOCK: int

def restrict_threads(what: int, *, keep: int = 0, ruleset: int = -1) -> int: ...
def name_refused_calls(
    line: bytes, *, time_at: int, name_at: int, ahead_of_utc: int, fd: int, names: Mapping[int, str]
) -> None: ...
