"""Agent messages: bytes of every structure, and every way in which a body can lie."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vring_serial.proto.agent import (
    AnnounceCapabilities,
    AudioVolumeSync,
    Capabilities,
    Capability,
    ClientDisconnected,
    Clipboard,
    ClipboardGrab,
    ClipboardRelease,
    ClipboardRequest,
    DisplayConfig,
    DisplayFlag,
    DisplayInfo,
    FileInfo,
    FileXferData,
    FileXferResult,
    FileXferStart,
    FileXferStatus,
    GraphicsDeviceInfo,
    Layout,
    MaxClipboard,
    MessageError,
    Monitor,
    MonitorsConfig,
    MonitorsFlag,
    MouseButton,
    MouseState,
    Reply,
)

FULL = Layout(selections=True, serials=True)
PLAIN = Layout()

# Laid out by hand from the structures of vd_agent.h.
BODIES = [
    (PLAIN, MouseState(1, 2, MouseButton.LEFT, 3), "01000000 02000000 02000000 03"),
    (
        PLAIN,
        MonitorsConfig((Monitor(1920, 1080, -1, 5),)),
        "01000000 01000000 38040000 80070000 20000000 ffffffff 05000000",
    ),
    (
        PLAIN,
        MonitorsConfig(
            (Monitor(640, 480, width_mm=300, height_mm=200),),
            MonitorsFlag.USE_POS | MonitorsFlag.PHYSICAL_SIZE,
        ),
        "01000000 03000000 e0010000 80020000 20000000 00000000 00000000 c800 2c01",
    ),
    (PLAIN, Reply(2, 1), "02000000 01000000"),
    (PLAIN, Clipboard(0, 1, b"hi"), "01000000 6869"),
    (FULL, Clipboard(1, 1, b"hi"), "01000000 01000000 6869"),
    (PLAIN, DisplayConfig(DisplayFlag.SET_COLOR_DEPTH, 16), "08000000 10000000"),
    (PLAIN, AnnounceCapabilities(True, Capabilities((0x38DE7,))), "01000000 e78d0300"),
    (
        PLAIN,
        AnnounceCapabilities(False, Capabilities((1, 2, 3))),
        "00000000 010000000200000003000000",
    ),
    (PLAIN, ClipboardGrab(0, (1, 2)), "01000000 02000000"),
    (Layout(serials=True), ClipboardGrab(0, (1,), 7), "07000000 01000000"),
    (Layout(selections=True), ClipboardGrab(2, (1,)), "02000000 01000000"),
    (FULL, ClipboardGrab(1, (1, 6), 9), "01000000 09000000 01000000 06000000"),
    (PLAIN, ClipboardRequest(0, 2), "02000000"),
    (FULL, ClipboardRequest(2, 2), "02000000 02000000"),
    (PLAIN, ClipboardRelease(0), ""),
    (FULL, ClipboardRelease(1), "01000000"),
    (PLAIN, FileXferStart(5, b"x"), "05000000 78"),
    (PLAIN, FileXferStatus(5, 3), "05000000 03000000"),
    (PLAIN, FileXferStatus(5, 4, bytes(8)), "05000000 04000000 0000000000000000"),
    (PLAIN, FileXferData(5, b"abc"), "05000000 0300000000000000 616263"),
    (PLAIN, FileXferData(5, b""), "05000000 0000000000000000"),
    (PLAIN, ClientDisconnected(), ""),
    (PLAIN, MaxClipboard(-1), "ffffffff"),
    (PLAIN, AudioVolumeSync(True, False, (1, 65535)), "01 00 02 0100 ffff"),
    (
        PLAIN,
        GraphicsDeviceInfo((DisplayInfo(1, 2, 3, b"pci/0"),)),
        "01000000 01000000 02000000 03000000 06000000 7063692f3000",
    ),
]


@pytest.mark.parametrize(("layout", "message", "body"), BODIES)
def test_bodies(layout, message, body):
    data = bytes.fromhex(body)
    assert message.pack(layout) == data
    assert type(message).unpack(data, layout) == message


@pytest.mark.parametrize(("layout", "message", "body"), BODIES)
def test_truncated_and_overlong_bodies_are_named_or_mean_something_else(layout, message, body):
    data = bytes.fromhex(body)
    for length in range(len(data)):
        try:
            other = type(message).unpack(data[:length], layout)
        except MessageError as error:
            named = str(error)
        else:
            named = ""
            assert other.pack(layout) == data[:length]
        assert not named or named.startswith("SPICE agent: VD")


LIES = [
    (MonitorsConfig, "00ca9a3b 00000000", "num_of_monitors"),
    (MonitorsConfig, "01010000 00000000", "num_of_monitors"),
    (MonitorsConfig, "02000000 00000000" + "00" * 20, "size"),
    (MonitorsConfig, "01000000 02000000" + "00" * 20, "size"),
    (AnnounceCapabilities, "", "size"),
    (AnnounceCapabilities, "01000000", "caps"),
    (AnnounceCapabilities, "01000000 0000", "caps"),
    (AnnounceCapabilities, "01000000" + "00" * 4 * 65, "caps"),
    (FileXferData, "01000000 ffffffffffffffff 00", "size"),
    (FileXferData, "01000000 00000000", "size"),
    (AudioVolumeSync, "00 00 ff 0000", "size"),
    (GraphicsDeviceInfo, "ffffffff", "count"),
    (GraphicsDeviceInfo, "01000000" + "00" * 12 + "ffffffff", "device_address_len"),
    (GraphicsDeviceInfo, "00000000 00", "size"),
    (ClientDisconnected, "00", "size"),
]


@pytest.mark.parametrize(("kind", "body", "field"), LIES)
def test_bodies_that_lie(kind, body, field):
    with pytest.raises(MessageError) as caught:
        kind.unpack(bytes.fromhex(body))
    assert caught.value.field.endswith(f".{field}")


@pytest.mark.parametrize(
    ("kind", "body", "field"),
    [
        (Clipboard, "03000000 01000000", "selection"),
        (ClipboardGrab, "ff000000 01000000", "selection"),
        (ClipboardGrab, "00000000", "size"),
        (ClipboardGrab, "00000000 00000000 00", "types"),
        (ClipboardRequest, "00000000", "size"),
        (ClipboardRelease, "", "size"),
    ],
)
def test_clipboard_bodies_that_lie(kind, body, field):
    with pytest.raises(MessageError) as caught:
        kind.unpack(bytes.fromhex(body), FULL)
    assert caught.value.field.endswith(f".{field}")


def test_capability_words_grow():
    caps = Capabilities.of(Capability.REPLY, 40)
    assert caps.words == (4, 256)
    assert 40 in caps
    assert 41 not in caps
    assert 4000 not in caps
    assert caps.names() == ["REPLY", "CAP_40"]
    assert caps.without(40, 4000).words == (4, 0)
    assert str(Capabilities()) == "none"


def test_layout_needs_both_announcements():
    selection = Capabilities.of(Capability.CLIPBOARD_SELECTION)
    both = selection.with_(Capability.CLIPBOARD_GRAB_SERIAL)
    assert Layout.negotiated(selection, both) == Layout(selections=True)
    assert Layout.negotiated(both, both) == FULL
    assert Layout.negotiated(both, ()) == PLAIN


def test_status_details():
    full = FileXferStatus(1, FileXferResult.NOT_ENOUGH_SPACE, (123456789012).to_bytes(8, "little"))
    assert full.free_space == 123456789012
    assert full.glib_error is None
    failed = FileXferStatus(1, FileXferResult.ERROR, b"\0" + struct.pack("<I", 14))
    assert failed.glib_error == 14
    assert failed.free_space is None
    assert FileXferStatus(1, FileXferResult.ERROR).glib_error is None


def test_file_info_as_spice_gtk_writes_it():
    text = b"[vdagent-file-xfer]\nname=hello world.txt\nsize=5242880\n"
    assert FileInfo.unpack(text) == FileInfo("hello world.txt", 5242880)
    assert FileInfo("hello world.txt", 5242880).pack() == text + b"\0"


@given(st.text(max_size=200).filter(lambda name: "\0" not in name), st.integers(0, 2**63 - 1))
def test_file_info_round_trip(name, size):
    name = name.encode("utf-8", "replace").decode()
    assert FileInfo.unpack(FileInfo(name, size).pack()) == FileInfo(name, size)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"[other]\nname=a\nsize=1\n",
        b"[vdagent-file-xfer]\nname=a\n",
        b"[vdagent-file-xfer]\nsize=1\n",
        b"[vdagent-file-xfer]\nname=a\nsize=-1\n",
        b"[vdagent-file-xfer]\nname=a\nsize=1e3\n",
        b"[vdagent-file-xfer]\nname=a\nsize=" + b"9" * 5000 + b"\n",
    ],
)
def test_file_info_that_says_nothing(text):
    with pytest.raises(MessageError) as caught:
        FileInfo.unpack(text)
    assert caught.value.field == "VDAgentFileXferStartMessage.data"
