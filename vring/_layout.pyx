"""Sizes and offsets, in bytes, of ring parts in both layouts (virtio 1.3, 2.7 and 2.8).

The rings use the same numbers. For the sizes of whole areas see ``SplitDriver.layout`` and
``PackedDriver.layout``.
"""

from __future__ import annotations


def used_event_offset(uint32_t size):
    """Return the offset of `used_event` in the available ring of a split queue (2.7.7).

    Args:
        size: descriptors of the queue.

    Returns:
        Bytes from the start of the available ring.
    """
    return used_event_at(size)


def avail_event_offset(uint32_t size):
    """Return the offset of `avail_event` in the used ring of a split queue (2.7.10).

    Args:
        size: descriptors of the queue.

    Returns:
        Bytes from the start of the used ring.
    """
    return avail_event_at(size)
