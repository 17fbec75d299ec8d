"""Descriptors that a socket's peers send beside their bytes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from vring_serial.chardev.socket import SocketChardev, SocketOptions

pytestmark = pytest.mark.usefixtures("no_leak")


@pytest.mark.parametrize("kind", ["path", "abstract", "client"])
async def test_nobody_sends_descriptors(tmp_path: Path, kind: str) -> None:
    """The kernel would close them in the pump's thread, and a peer can make that last for ever."""
    path = tmp_path / "s"
    abstract = kind == "abstract"
    listener = socket.socket(socket.AF_UNIX)
    if kind == "client":
        listener.bind(str(path))
        listener.listen()
        dut = SocketChardev("dut", SocketOptions(path=str(path)))
    else:
        dut = SocketChardev(
            "dut", SocketOptions(path=str(path), server=True, wait=False, abstract=abstract)
        )
    await dut.start()
    try:
        if kind == "client":
            peer, _ = listener.accept()
        else:
            peer = socket.socket(socket.AF_UNIX)
            peer.connect(f"\0{path}" if abstract else str(path))
        with peer:
            try:
                peer.getsockopt(socket.SOL_SOCKET, 83)
            except OSError:
                pytest.skip("this kernel cannot refuse descriptors")
            with pytest.raises(PermissionError):
                socket.send_fds(peer, [b"x"], [0])
    finally:
        listener.close()
        await dut.aclose()
