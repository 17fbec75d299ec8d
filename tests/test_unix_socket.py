"""Listening at a path: what is replaced, what is left alone and what is removed."""

from __future__ import annotations

import os
import resource
import socket
import stat
from pathlib import Path

import pytest

from vring_serial.unix_socket import MAX_PATH, SocketPathError, UnixListener, encode_path


def can_refuse_descriptors() -> bool:
    """Linux 6.16 and later."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            return probe.getsockopt(socket.SOL_SOCKET, 83) == 1
        except OSError:
            return False


def test_it_listens_and_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = UnixListener(str(path))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        listener.socket.accept()[0].close()
    assert not os.get_blocking(listener.socket.fileno())
    listener.close()
    listener.close()
    assert not path.exists()


@pytest.mark.parametrize("descriptors", [False, True])
def test_descriptors_come_only_where_they_are_wanted(tmp_path: Path, descriptors: bool) -> None:
    listener = UnixListener(str(tmp_path / "s"), descriptors=descriptors)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
        if descriptors:
            assert socket.send_fds(client, [b"x"], [0]) == 1
        elif can_refuse_descriptors():
            with pytest.raises(PermissionError):
                socket.send_fds(client, [b"x"], [0])
            assert client.send(b"x") == 1
    listener.close()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listener = UnixListener(str(path))
    listener.close()
    assert not path.exists()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
@pytest.mark.parametrize("listening", [True, False])
def test_whoever_is_there_is_left_alone_and_not_disturbed(
    tmp_path: Path, kind: socket.SocketKind, listening: bool
) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(path))
        if listening and kind != socket.SOCK_DGRAM:
            other.listen()
        with pytest.raises(SocketPathError, match="another process listens on it") as caught:
            UnixListener(str(path))
        assert caught.value.path == str(path)
        assert path.is_socket()
        other.setblocking(False)
        with pytest.raises(OSError):
            other.recv(1) if kind == socket.SOCK_DGRAM else other.accept()


def test_a_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(SocketPathError, match="exists and is not a socket"):
        UnixListener(str(path))
    assert path.read_text() == "precious"


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(SocketPathError, match=f"there is no directory {tmp_path / 'missing'}"):
        UnixListener(str(tmp_path / "missing" / "s"))


def test_a_path_has_107_bytes_at_most() -> None:
    assert encode_path("é" * 53) == "é".encode() * 53
    with pytest.raises(SocketPathError, match=r"108 bytes.*107 at most") as caught:
        encode_path("é" * 54)
    assert caught.value.why.startswith("the path has")
    assert MAX_PATH == 107


def test_without_a_descriptor_the_path_is_named(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(SocketPathError, match="Too many open files"):
            UnixListener(str(tmp_path / "s"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_what_took_its_place_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = UnixListener(str(path))
    path.unlink()
    second = UnixListener(str(path))
    listener.close()
    assert stat.S_ISSOCK(path.stat().st_mode)
    second.close()
    assert not path.exists()
