"""Two processes hammer one ring: a driver and a device, with a checksum in every message.

    python fuzz/hammer.py --wraps 10000 --layout split --event-idx

A memory-ordering mistake on either side shows as a message that arrives twice, not at all, out of
order, or with bytes of another. The device sleeps on an eventfd whenever it asked for a kick, and
so does the driver, so a lost notification shows as a stall.
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import os
import select
import sys
import time

import numpy as np
from numpy.typing import NDArray

from vring import GuestMemory, PackedDriver, PackedQueue, Region, SplitDriver, SplitQueue, layout

RINGS, SLOTS, SLOT = 0x0, 0x10000, 64
WORDS = 6  # of 8 bytes in a message
FACTORS = np.array([1, 3, 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
STALL_MS = 10_000


def parts(size: int) -> tuple[int, int, int]:
    """Where the parts of a ring of either layout lie: a packed one takes less than a split one."""
    descriptors, available, _ = SplitDriver.layout(size)
    driver_area = RINGS + descriptors
    return RINGS, driver_area, driver_area + available + -available % layout.USED_ALIGN


def messages(first: int, count: int) -> NDArray[np.uint64]:
    """`count` messages from number `first` on: the number, four words made of it, a checksum."""
    numbers = np.arange(first, first + count, dtype=np.uint64)
    out = np.empty((count, WORDS), np.uint64)
    for i, factor in enumerate(FACTORS):
        out[:, i] = numbers * factor
    out[:, -1] = np.bitwise_xor.reduce(out[:, :-1], axis=1)
    return out


def wait(fd: int, who: str) -> None:
    if not select.select([fd], [], [], STALL_MS / 1000)[0]:
        raise SystemExit(f"{who}: no notification for {STALL_MS} ms: one was lost")
    os.eventfd_read(fd)


def device(args: argparse.Namespace, pages: mmap.mmap, kick: int, call: int) -> None:
    """Checks every message in order and completes it; suppresses kicks while it works."""
    kind = PackedQueue if args.layout == "packed" else SplitQueue
    memory = GuestMemory([Region(0, pages)])
    queue = kind(memory, args.size, *parts(args.size), event_idx=args.event_idx)
    expected = 0
    while expected < args.messages:
        queue.disable_notifications()
        while batch := queue.pop_many(1 + expected % 3 * args.size):
            got = np.frombuffer(batch.gather(), np.uint64).reshape(-1, WORDS)
            wrong = (got != messages(expected, len(batch))).any(axis=1)
            if wrong.any():
                at = int(np.argmax(wrong))
                raise SystemExit(f"device: message {expected + at} arrived as {got[at].tolist()}")
            expected += len(batch)
            if queue.push_many(batch):
                os.eventfd_write(call, 1)
        if expected < args.messages and not queue.enable_notifications():
            wait(kick, "device")


def driver(args: argparse.Namespace, pages: mmap.mmap, kick: int, call: int) -> None:
    """Writes messages into slots in turn; sleeps when no descriptor is free."""
    kind = PackedDriver if args.layout == "packed" else SplitDriver
    memory = GuestMemory([Region(0, pages)])
    ring = kind(memory, args.size, *parts(args.size), event_idx=args.event_idx)
    slots = np.frombuffer(pages, np.uint64, args.size * SLOT // 8, SLOTS).reshape(args.size, -1)
    sent = done = 0
    deadline = time.monotonic() + args.seconds
    while done < args.messages:
        room = min(ring.num_free, args.messages - sent, 1 + sent % 5 * args.size)
        at = (sent + np.arange(room)) % args.size
        slots[at, :WORDS] = messages(sent, room)
        lengths = np.full(room, 8 * WORDS, np.uint32)
        ring.add_many(SLOTS + SLOT * at.astype(np.uint64), lengths, False)
        sent += room
        if ring.publish():
            os.eventfd_write(kick, 1)
        used = len(ring.get_used()[0])
        if not used and not ring.num_free and not ring.enable_notifications():
            wait(call, "driver")
            used = len(ring.get_used()[0])
        ring.disable_notifications()
        if sent == args.messages and done + used < sent and not ring.enable_notifications():
            wait(call, "driver")
            used += len(ring.get_used()[0])
        done += used
        if time.monotonic() > deadline:
            raise SystemExit(f"driver: {done} of {args.messages} messages in {args.seconds} s")


def turn(args: argparse.Namespace) -> int:
    """How many messages take the available index around once."""
    return int(args.size) if args.layout == "packed" else 65536


def run(args: argparse.Namespace) -> int:
    """Runs both sides; 0 if every message arrived once, whole and in order."""
    pages = mmap.mmap(-1, SLOTS + args.size * SLOT)
    kick, call = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    context = multiprocessing.get_context("fork")
    shared = args, pages, kick, call
    sides = [context.Process(target=side, args=shared) for side in (device, driver)]
    start = time.monotonic()
    for side in sides:
        side.start()
    while any(side.is_alive() for side in sides):
        for side in sides:
            side.join(0.05)
        if any(side.exitcode not in (None, 0) for side in sides):
            for side in sides:
                side.terminate()
    os.close(kick)
    os.close(call)
    elapsed = time.monotonic() - start
    wraps = args.messages / turn(args)
    print(
        f"{args.layout}, event_idx {args.event_idx}: {args.messages} messages, {wraps:.0f} wraps, "
        f"{elapsed:.1f} s, {args.messages / elapsed / 1e6:.2f} M/s"
    )
    return max(abs(side.exitcode or 0) for side in sides)


def main() -> int:
    parser = argparse.ArgumentParser(description="Two processes hammer one ring.")
    parser.add_argument("--layout", choices=["split", "packed"], default="split")
    parser.add_argument("--event-idx", action="store_true")
    parser.add_argument("--size", type=int, default=256, help="descriptors, at most 1024")
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--wraps", type=int, help="so often around the index instead of --messages")
    parser.add_argument("--seconds", type=float, default=3600, help="give up after this")
    args = parser.parse_args()
    if not 1 <= args.size <= 1024:
        parser.error("--size must be 1 to 1024")
    if args.wraps:
        args.messages = args.wraps * turn(args)
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
