"""Clients that come and go as fast as they can fill no disk."""

from __future__ import annotations

import socket
from typing import Any


def test_one_limit_for_all_clients(server: Any, caplog: Any) -> None:
    caplog.set_level("INFO")
    for count in range(1, 101):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(server.path))
            sock.sendall(bytes(16))
            assert sock.recv(1) == b""
        server.wait_for(*["connected", "gone"] * count)
    assert len(caplog.records) <= 70
