"""Where the server listens."""

from __future__ import annotations

import socket

import pytest

from vring_serial import SpiceOptions
from vring_serial.errors import ResourceError
from vring_serial.spice.listener import Listener, is_local


def options(**values):
    return SpiceOptions(disable_ticketing=True, **values)


@pytest.fixture
def taken():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


def test_a_port_that_is_taken(taken):
    with pytest.raises(ResourceError) as caught:
        Listener(options(port=taken, addr="127.0.0.1"))
    assert str(caught.value) == (
        f"SPICE: cannot listen on 127.0.0.1:{taken}: Address already in use"
    )


def test_the_first_port_that_is_free(taken):
    listener = Listener(options(port=taken, autoport=True, addr="127.0.0.1", tls_port=taken + 1))
    try:
        (address,) = listener.addresses
        assert int(address.rpartition(":")[2]) > taken + 1
        with socket.create_connection(listener.sockets[0].getsockname()):
            pass
    finally:
        listener.close()
    listener.close()


def test_no_port_is_free(taken, monkeypatch):
    monkeypatch.setattr("vring_serial.spice.listener.PORTS_TRIED", 1)
    with pytest.raises(ResourceError, match=f"no TCP port from {taken} to {taken} is free"):
        Listener(options(port=taken, autoport=True, addr="127.0.0.1"))


@pytest.mark.parametrize("addr", ["no.such.host.invalid", "a..b", "x" * 80])
def test_a_name_that_is_no_address(addr):
    with pytest.raises(ResourceError, match="SPICE: address "):
        Listener(options(port=1234, addr=addr))


def test_an_address_of_another_machine(taken):
    with pytest.raises(ResourceError, match="Cannot assign requested address"):
        Listener(options(port=taken, addr="192.0.2.1"))


def test_a_unix_socket(tmp_path):
    path = tmp_path / "spice.sock"
    listener = Listener(options(unix=True, addr=str(path)))
    assert listener.addresses == [f"unix:{path}"]
    with pytest.raises(ResourceError, match="another process listens on it"):
        Listener(options(unix=True, addr=str(path)))
    listener.close()
    assert not path.exists()


def test_only_tls_binds_nothing_here():
    listener = Listener(options(tls_port=1))
    assert listener.sockets == []


@pytest.mark.parametrize(
    ("family", "address", "local"),
    [
        (socket.AF_INET, "127.0.0.1", True),
        (socket.AF_INET, "127.3.2.1", True),
        (socket.AF_INET, "0.0.0.0", False),
        (socket.AF_INET6, "::1", True),
        (socket.AF_INET6, "::", False),
        (socket.AF_INET6, "::ffff:127.0.0.1", True),
        (socket.AF_INET6, "::ffff:0.0.0.0", False),
    ],
)
def test_who_can_reach_a_socket(family, address, local):
    with socket.socket(family) as sock:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((address, 0))
        assert is_local(sock) is local


def test_this_machine_alone_reaches_a_unix_socket(tmp_path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        assert is_local(sock)
