"""Host ends of ports: sockets, ptys, files, pipes, standard streams, memory, Python code."""

from __future__ import annotations

from vring_serial.chardev.base import Chardev, ChardevUser, DescriptorEnd, End, ProtocolEnd
from vring_serial.chardev.log import LogOptions, OutputLog
from vring_serial.chardev.options import Options
from vring_serial.chardev.registry import kinds, make, options_type

__all__ = [
    "Chardev",
    "ChardevUser",
    "DescriptorEnd",
    "End",
    "LogOptions",
    "Options",
    "OutputLog",
    "ProtocolEnd",
    "kinds",
    "make",
    "options_type",
]
