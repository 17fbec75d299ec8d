"""What `import vring` offers: every error, the version, the layout of rings."""

from __future__ import annotations

from importlib.metadata import version

import vring
import vring.errors
from vring import layout


def subclasses(kind: type) -> set[type]:
    below = set(kind.__subclasses__())
    return below.union(*(subclasses(each) for each in below))


def test_every_error_is_importable_from_the_package() -> None:
    ours = {kind for kind in subclasses(vring.VringError) if kind.__module__ == "vring.errors"}
    assert ours
    for kind in ours:
        assert kind.__name__ in vring.__all__
        assert getattr(vring, kind.__name__) is kind


def test_every_name_is_there() -> None:
    assert len(set(vring.__all__)) == len(vring.__all__)
    for name in vring.__all__:
        assert getattr(vring, name) is not None


def test_the_version_is_the_distribution_s() -> None:
    assert vring.__version__ == version("vring")


def test_layout_is_the_specification_s() -> None:
    assert (layout.DESC_SIZE, layout.QUEUE_SIZE_MAX, layout.WRAP) == (16, 32768, 0x8000)
    assert (layout.AVAIL_FLAGS, layout.AVAIL_INDEX, layout.AVAIL_RING) == (0, 2, 4)
    assert (layout.USED_FLAGS, layout.USED_INDEX, layout.USED_RING) == (0, 2, 4)
    assert (layout.AVAIL_ENTRY, layout.USED_ENTRY, layout.EVENT_INDEX_SIZE) == (2, 8, 2)
    assert (layout.DESC_ALIGN, layout.AVAIL_ALIGN, layout.USED_ALIGN) == (16, 2, 4)
    assert (layout.PACKED_ID, layout.PACKED_FLAGS) == (12, 14)
    assert (layout.EVENT_SIZE, layout.EVENT_ALIGN) == (4, 4)
    assert layout.used_event_offset(8) == 4 + 2 * 8
    assert layout.avail_event_offset(8) == 4 + 8 * 8
    assert vring.SplitDriver.layout(8) == (16 * 8, 6 + 2 * 8, 6 + 8 * 8)
    assert vring.PackedDriver.layout(8) == (16 * 8, 4, 4)
