"""systemd's descriptor store protocol: what is stored is kept as it is, and nothing else counts."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from tests.support.leaks import held
from tests.support.waiting import wait_until
from vring_serial.errors import ResourceError
from vring_serial.service.descriptor_store import DescriptorStore, Notifier, is_name


@pytest.fixture
def ends():
    keeper, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    store = DescriptorStore(5)
    with keeper:
        notifier = Notifier(worker)
        yield keeper, store, notifier
        notifier.close()
        store.close()


def stored(store):
    return {name: len(fds) for name, fds in store.descriptors.items()}


def test_descriptors_keep_what_they_are(ends):
    keeper, store, notifier = ends
    reader, writer = os.pipe()
    os.write(writer, b"unread")
    notifier.store("a pipe", reader)
    os.close(reader)
    assert store.receive(keeper) == {}
    assert os.read(store.descriptors["a pipe"][0], 9) == b"unread"
    os.close(writer)


def test_names_add_up_and_go_together(ends):
    keeper, store, notifier = ends
    for name in ("a", "a", "b"):
        notifier.store(name, keeper.fileno())
        assert store.receive(keeper) == {}
    assert stored(store) == {"a": 2, "b": 1}
    assert len(store) == 3
    notifier.remove("a")
    notifier.remove("c")
    store.receive(keeper)
    store.receive(keeper)
    assert stored(store) == {"b": 1}
    assert store.receive(keeper) is None


def test_no_more_are_kept_than_the_limit_and_the_rest_is_closed(ends):
    keeper, store, notifier = ends
    before = held()
    notifier.notify("FDSTORE=1", "FDNAME=many", fds=[keeper.fileno()] * 200)
    store.receive(keeper)
    assert stored(store) == {"many": 5}
    notifier.store("more", keeper.fileno())
    store.receive(keeper)
    assert stored(store) == {"many": 5}
    assert store.refused == 2
    store.close()
    wait_until(lambda: not store.aside.overdue)  # what closes descriptors for it
    assert held() == before


@pytest.mark.parametrize(
    "lines",
    [
        ("",),
        ("FDSTORE",),
        ("FDSTORE=1", "FDNAME=a:b"),
        ("FDSTORE=1", "FDNAME="),
        ("FDSTORE=1", "FDNAME=\x7f"),
        ("FDSTORE=1", "FDNAME=" + "x" * 256),
        ("FDSTORE=0", "FDNAME=a"),
        ("STATUS=fds for nobody",),
        ("X" * 5000,),
    ],
)
def test_what_is_not_understood_is_closed(ends, lines):
    keeper, store, notifier = ends
    before = held()
    notifier.notify(*lines, fds=[keeper.fileno()] * 3)
    assert store.receive(keeper) is not None
    assert len(store) == 0
    wait_until(lambda: not store.aside.overdue)  # what closes descriptors for it
    assert held() == before


def test_other_fields_are_handed_on(ends):
    keeper, store, notifier = ends
    notifier.notify("READY=1", "STATUS=a=b", "nothing", "=x")
    assert store.receive(keeper) == {"READY": "1", "STATUS": "a=b"}


def test_a_barrier_waits_until_all_was_taken(ends):
    keeper, store, notifier = ends
    notifier.store("a", keeper.fileno())
    thread = threading.Thread(target=notifier.barrier)
    thread.start()
    keeper.setblocking(True)
    while "a" not in stored(store):
        store.receive(keeper)
    assert thread.is_alive()
    while thread.is_alive():
        store.receive(keeper)
    thread.join()


def test_a_keeper_that_takes_nothing_is_an_error(ends):
    keeper, _, notifier = ends
    with pytest.raises(ResourceError, match=r"took nothing for 0\.01 s"):
        notifier.barrier(0.01)
    keeper.close()
    with pytest.raises(ResourceError, match="the keeper does not hear: Connection refused"):
        notifier.notify("READY=1")


def test_the_environment_says_where_the_keeper_is(tmp_path):
    assert Notifier.from_environment({}) is None
    for address in (str(tmp_path / "notify"), "@vring-test-notify"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(address.replace("@", "\0"))
            environment = {"NOTIFY_SOCKET": address}
            notifier = Notifier.from_environment(environment)
            assert environment == {}
            notifier.notify("READY=1")
            assert sock.recv(99) == b"READY=1"
            notifier.close()
    with pytest.raises(ResourceError, match=r"NOTIFY_SOCKET .*none: No such file"):
        Notifier.from_environment({"NOTIFY_SOCKET": str(tmp_path / "none")})


@pytest.mark.parametrize("name", ["", "a:b", "é", "\n", "x" * 256])
def test_names_are_those_of_systemd(name):
    assert is_name("controller0/kick.5#12")
    assert not is_name(name)
