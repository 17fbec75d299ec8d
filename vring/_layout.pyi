from typing import Final

QUEUE_SIZE_MAX: Final = 32768
DESC_SIZE: Final = 16
DESC_ALIGN: Final = 16
AVAIL_ALIGN: Final = 2
AVAIL_FLAGS: Final = 0
AVAIL_INDEX: Final = 2
AVAIL_RING: Final = 4
AVAIL_ENTRY: Final = 2
USED_ALIGN: Final = 4
USED_FLAGS: Final = 0
USED_INDEX: Final = 2
USED_RING: Final = 4
USED_ENTRY: Final = 8
EVENT_INDEX_SIZE: Final = 2
PACKED_ID: Final = 12
PACKED_FLAGS: Final = 14
EVENT_SIZE: Final = 4
EVENT_ALIGN: Final = 4
WRAP: Final = 0x8000

def used_event_offset(size: int) -> int: ...
def avail_event_offset(size: int) -> int: ...
