"""Host ends of QEMU and libvirt that are not supported here, each with the reason."""

from __future__ import annotations

_OF_EMULATOR = "it is a part of the emulator itself"

#: By QEMU's and libvirt's names.
UNSERVED = {
    "braille": _OF_EMULATOR,
    "dbus": "it needs the emulator's D-Bus display; use unix",
    "hub": "a port has one host end",
    "msmouse": _OF_EMULATOR,
    "mux": "ports share a host end that has mux=on",
    "nmdm": "null-modem devices are BSD's; use pty or unix",
    "parallel": "a port has no lines for it; connect one to a pty or a unix socket with socat",
    "parport": "a port has no lines for it; connect one to a pty or a unix socket with socat",
    "qemu-vdagent": "it is QEMU's own agent end; spicevmc is the one built in here",
    "testdev": _OF_EMULATOR,
    "vc": "it is a text console in the emulator's window; use pty",
    "wctablet": _OF_EMULATOR,
}
