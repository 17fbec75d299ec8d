"""Run by test_hostile.py: pops one chain whose descriptor lies in a watched page."""

from __future__ import annotations

import ctypes
import mmap
import sys

from vring import GuestMemory, PackedQueue, Region, SplitQueue

DESC, AVAIL, USED, DATA = 0x0, 0x1000, 0x2000, 0x3000


def main(library: str, kind: str) -> None:
    counter = ctypes.CDLL(library)
    pages = mmap.mmap(-1, 0x4000)
    memory = GuestMemory([Region(0, pages)])
    packed = kind == "PackedQueue"
    flags = 0x80 << 48 if packed else 0
    memory.write(DESC, DATA.to_bytes(8, "little") + (64 | flags).to_bytes(8, "little"))
    memory.write(AVAIL + 2, b"\1\0")
    queue = (PackedQueue if packed else SplitQueue)(memory, 4, DESC, AVAIL, USED)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    counter.watch(ctypes.c_void_p(address))
    batch = queue.pop_many(1)
    offsets, times = (ctypes.c_uint * 64)(), (ctypes.c_uint * 64)()
    n = counter.unwatch(offsets, times, 64)
    assert batch.lengths.tolist() == [64]
    for i in range(n):
        print(f"{offsets[i]:#x} {times[i]}")


main(sys.argv[1], sys.argv[2])
