"""A hostile driver in a process of its own: it changes rings while the device works on them.

    python fuzz/hostile.py --layout packed --seconds 60

Descriptors, flags, indices, heads and indirect tables change at any moment, between two loads of a
pop too. The device pops, copies, completes and gives back, in Python and in a pump's thread. The
invariant is that of ring.py: every call returns or raises a VringError, and every segment lies in
guest memory. Pages without access lie around each region, so a byte beside it ends the process;
under `make sanitize` and `make tsan` the extensions are instrumented as well.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ring import AVAIL, DATA, RING, TABLES, USED, Input, check_batch, descriptor

from vring import (
    FlowEvent,
    GuestMemory,
    PackedQueue,
    Pump,
    Region,
    RingError,
    SplitQueue,
    VringError,
    layout,
)

#: guest address and bytes of each region; the last two touch.
REGIONS = ((RING, 0x2000), (TABLES, 0x2000), (DATA, 0x1000), (DATA + 0x1000, 0x1000))
PAGE = mmap.PAGESIZE
POOL = 4096
#: How long the pump has one queue, at most.
PUMP_SECONDS = 0.005
Bytes = NDArray[np.uint8]


def guest_memory() -> list[Bytes]:
    """The regions' bytes, shared with children of fork, a page without access around each."""
    pages = mmap.mmap(-1, sum(size for _, size in REGIONS) + PAGE * (len(REGIONS) + 1))
    raw = np.frombuffer(pages, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    arrays, at = [], 0
    for size in [*(size for _, size in REGIONS), 0]:
        if libc.mprotect(ctypes.c_void_p(raw.ctypes.data + at), PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
        at += PAGE
        arrays.append(raw[at : at + size])
        at += size
    return arrays[:-1]


def change(arrays: list[Bytes], packed: bool, size: int, seed: int) -> None:
    """Changes the ring without end, as fast as it goes."""
    source = random.Random(seed)
    rows = b"".join(descriptor(Input(source.randbytes(32)), packed) for _ in range(POOL))
    pool = np.frombuffer(rows, np.uint16).reshape(POOL, 8)
    ring, tables = arrays[0].view(np.uint16), arrays[1].view(np.uint16)
    slots = ring[: layout.DESC_SIZE // 2 * size].reshape(size, -1)
    avail = ring[(AVAIL - RING) // 2 :]
    entries = tables.reshape(-1, 8)
    while True:
        i, j = source.randrange(POOL), source.randrange(POOL - 64)
        match source.randrange(6):
            case 0:  # one descriptor
                slots[i % size] = pool[i]
            case 1:  # half of one: its flags and what lies beside them
                half = layout.PACKED_ID // 2
                slots[i % size, half:] = pool[i, half:]
            case 2:  # many at once
                n = 1 + i % min(size, 64)
                slots[:n] = pool[j : j + n]
            case 3:  # part of an indirect table
                n = i % 64
                entries[n : n + 64] = pool[j : j + 64]
            case 4 if not packed and i % 8 == 0:  # the index, mostly by a little
                step = i % 4 if i % 64 else i
                index = layout.AVAIL_INDEX // 2
                avail[index] = (int(avail[index]) + step) & 0xFFFF
            case _:  # heads; of a packed ring, what the driver wishes
                avail[layout.AVAIL_RING // 2 + i % size] = j % size if j % 1024 else j
                avail[layout.AVAIL_FLAGS // 2] = i & 3


def use_in_python(queue: Any, source: random.Random, arrays: list[Bytes], size: int) -> int:
    """One batch or chain, through one of the interfaces; chains popped."""
    if source.randrange(3) == 0:
        chain = queue.pop()
        if chain is None:
            return 0
        total = sum(map(len, chain.readable)), sum(map(len, chain.writable))
        assert total == (chain.readable_bytes, chain.writable_bytes)
        if chain.readable_bytes < 1 << 20:
            chain.read()
        queue.push(chain, chain.write(source.randbytes(64)))
        return 1
    batch = queue.pop_many(source.randrange(size + 1), source.randrange(3) * 4000)
    check_batch(batch, arrays, size)
    if int(batch.readable_bytes.sum()) < 1 << 20:
        batch.gather()
    used, written = batch.scatter(source.randbytes(200))
    count = len(batch)
    match source.randrange(4):
        case 0:
            queue.push_many(batch, written, used)
            if len(batch):
                queue.unpop(batch)
        case 1:
            queue.unpop(batch)
        case _:
            queue.push_many(batch)
    (queue.enable_notifications, queue.disable_notifications)[source.randrange(2)]()
    return count


def use_in_pump(queue: Any, pump: Pump, source: random.Random, kick: int, call: int) -> int:
    """A flow over the queue until the ring breaks, for a bounded time; chains moved."""
    events: list[FlowEvent] = []
    outgoing = source.randrange(2)
    fd = os.open("/dev/null" if outgoing else "/dev/zero", os.O_RDWR)
    names = {"kick_fd": kick, "call_fd": call, "on_event": lambda event, _: events.append(event)}
    try:
        if outgoing:
            flow = pump.guest_to_host(queue, write_fd=fd, lossy=source.randrange(2) == 1, **names)
        else:
            flow = pump.host_to_guest(queue, read_fd=fd, **names)
        end = time.monotonic() + PUMP_SECONDS
        while not events and time.monotonic() < end:
            os.eventfd_write(kick, 1)
            time.sleep(0)
            pump.dispatch()
        flow.detach()
    finally:
        os.close(fd)
    return int(flow.counters.chains)


def run(args: argparse.Namespace) -> int:
    """Works on the ring that the other process changes; 0 if the invariant held."""
    packed = args.layout == "packed"
    source = random.Random(args.seed)
    arrays = guest_memory()
    regions = [Region(at, array) for (at, _), array in zip(REGIONS, arrays, strict=True)]
    memory = GuestMemory(regions)
    kind: Any = PackedQueue if packed else SplitQueue
    context = multiprocessing.get_context("fork")
    job = (arrays, packed, args.size, args.seed)
    driver = context.Process(target=change, args=job, daemon=True)
    driver.start()
    kick, call = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    chains, faults = Counter[str](), Counter[str]()
    end = time.monotonic() + args.seconds
    try:
        with Pump() as pump:
            while time.monotonic() < end:
                names = ("event_idx", "in_order", "indirect")
                features = {name: source.randrange(2) == 1 for name in names}
                if packed:
                    index = source.choice((0x8000, source.randrange(args.size)))
                else:  # where the driver is, more or less
                    index = (
                        memory.load16(AVAIL + layout.AVAIL_INDEX) - source.randrange(args.size // 2)
                    ) & 0xFFFF
                queue = kind(memory, args.size, RING, AVAIL, USED, index=index, **features)
                by = "pump" if source.randrange(4) == 0 else "Python"
                try:
                    if by == "pump":
                        chains[by] += use_in_pump(queue, pump, source, kick, call)
                    else:
                        for _ in range(64):
                            chains[by] += use_in_python(queue, source, arrays, args.size)
                except RingError:
                    pass
                except VringError as error:  # misuse that the driver cannot cause
                    raise AssertionError(f"not the driver's doing: {error}") from error
                faults[type(queue.broken).__name__] += 1
        alive = driver.is_alive()
    finally:
        driver.kill()
        driver.join()
        os.close(kick)
        os.close(call)
    kinds = ", ".join(f"{name} {n}" for name, n in sorted(faults.items()))
    print(f"{args.layout}: {dict(chains)} chains; how rings ended: {kinds}")
    if not alive or min(chains["pump"], chains["Python"]) == 0 or len(faults) < 4:
        print("that is too little to have tried anything", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="A hostile driver changes a device's ring.")
    parser.add_argument("--layout", choices=["split", "packed"], default="split")
    parser.add_argument("--size", type=int, default=64, help="descriptors, 64 to 256")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    if args.size not in (64, 128, 256):
        parser.error("--size must be 64, 128 or 256")
    print(f"seed {args.seed}")
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
