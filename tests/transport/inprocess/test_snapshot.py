"""A machine is saved at any moment, and goes on in another process, byte by byte."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import copy
import functools
import json
import os
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.device.console.test_port import PairChardev, received
from tests.support.emulated import KINDS, NAME, NR, Guest, Machine, Pair
from tests.support.waiting import wait_until
from vring_serial.chardev.null import NullChardev, NullOptions
from vring_serial.chardev.socket import SocketChardev, SocketOptions
from vring_serial.device.console.config_space import DEFAULT_FEATURES
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.errors import LocalProtocolError, StateError
from vring_serial.proto.virtio import Feature
from vring_serial.transport.inprocess.fronts import InProcessMmio, LoopHost

WAYS = [(kind, packed) for kind in KINDS for packed in (False, True)]
WAYS.remove(("legacy", True))
LARGE = 1_500_000  # several pieces for a protocol


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}-{'packed' if way[1] else 'split'}")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = Pair(*request.param)
    yield pair
    pair.machine.close()


def test_a_stream_both_ways_goes_on_wherever_it_was_saved(pair: Pair) -> None:
    chance = random.Random(WAYS.index((pair.machine.kind, pair.machine.packed)))
    hops = 0
    while hops < 3:
        match chance.randrange(10):
            case 0 | 1 if pair.guest.can_send():
                data = chance.randbytes(chance.choice((1, 5000, LARGE)))
                pair.send(data, chance.randint(1, min(8, len(data))))
            case 2 | 3:
                pair.write(chance.randbytes(chance.randint(1, 100_000)))
            case 4:
                pair.machine.end.resume()
            case 5 | 6:
                pair.machine.host.poll()
            case 7 | 8:
                pair.guest.run(pair.machine)
            case 9:
                hops += 1
                pair.hop(chance.randrange(4))
                pair.guest.run(pair.machine)
    pair.finish()


def test_half_a_large_chain_and_bytes_that_wait_go_along(pair: Pair) -> None:
    pair.write(random.Random(1).randbytes(LARGE))
    pair.send(random.Random(2).randbytes(LARGE), 7)
    pair.machine.host.poll()
    assert 0 < len(pair.machine.end.got) < LARGE
    pair.hop(1)
    assert 0 < len(pair.got) < LARGE
    pair.finish()


def saved_by(kind: str, packed: bool = False) -> tuple[bytes, bytes]:
    """A machine that was saved in the middle of everything, and its guest's memory."""
    pair = Pair(kind, packed)
    try:
        pair.write(bytes(LARGE))
        pair.send(bytes(LARGE), 3)
        pair.machine.host.poll()
        return pair.machine.front.save(), bytes(pair.guest.ram)
    finally:
        pair.machine.close()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"max_ports": 3}, "max_ports 2, not 3"),
        ({"features": DEFAULT_FEATURES & ~Feature.EVENT_IDX}, "not offered: EVENT_IDX"),
        ({"queue_size_max": 8}, "16 descriptors; 1 to 8 are possible"),
    ],
)
def test_a_device_that_is_another_one_is_named(options: dict[str, Any], why: str) -> None:
    saved, ram = saved_by("mmio")
    with pytest.raises(StateError, match=why):
        Machine("mmio", False, bytearray(ram), saved, **options)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("mmio", "'PCI function', not of 'virtio-mmio device"),
        ("transitional", "transitional is False in the state, True here"),
    ],
)
def test_another_front_is_named(kind: str, why: str) -> None:
    saved, ram = saved_by("pci")
    with pytest.raises(StateError, match=why):
        Machine(kind, False, bytearray(ram), saved)


class Untouched(NullChardev):
    """A host end that must not be started."""

    async def start(self) -> None:
        raise AssertionError("started")


@pytest.mark.parametrize("port", [None, (0, NAME, False), (NR, "other", False), (NR, NAME, True)])
def test_other_ports_are_named_and_nothing_is_started(port: tuple[int, str, bool] | None) -> None:
    pair = Pair("mmio", False)
    saved = pair.machine.front.save()
    pair.machine.close()
    machine = Machine("mmio", False, pair.guest.ram)  # has a loop, and a front to ask
    device = Controller(max_ports=2, queue_size_max=16)
    if port is not None:
        nr, name, console = port
        device.add_port(Port(nr, name, Untouched("null", NullOptions()), console=console))
    before = copy.deepcopy(device.state)
    with pytest.raises(StateError, match=r"port [01]"):
        machine.host.complete(
            machine.front.restore(saved, machine.host, device, None, interrupt=lambda level: None)
        )
    assert not device.started
    assert device.state == before
    machine.close()


def test_a_device_that_was_started_takes_no_state() -> None:
    pair = Pair("mmio", False)
    saved = pair.machine.front.save()
    with pytest.raises(LocalProtocolError, match="started"):
        pair.machine.host.complete(
            pair.machine.front.restore(
                saved, pair.machine.host, pair.machine.device, None, interrupt=lambda level: None
            )
        )
    pair.machine.close()


# --- host ends


def test_a_machine_stands_still_after_it_was_saved_and_can_go_on() -> None:
    guest = Guest(False)
    chardev = PairChardev()
    machine = Machine("pci", False, guest.ram, chardev=chardev)
    guest.boot(machine)
    data = os.urandom(LARGE)
    guest.send(machine, data, 3)
    machine.host.poll()
    saved = machine.front.save()
    before, ram = received(chardev.peer), bytes(guest.ram)
    chardev.peer.send(b"from the host")
    for _ in range(5):
        machine.host.poll()
    assert guest.ram == ram
    assert received(chardev.peer) == b""
    assert len(before) < len(data)
    # One goes on here, and another from the copy; both are whole.
    machine.front.set_memory(guest.memory)
    collect(machine, guest, chardev, before, data)
    run_until(machine, guest, lambda: guest.got == b"from the host")
    machine.close()
    guest.ram[:] = ram
    other = PairChardev()
    machine = Machine("pci", False, guest.ram, saved, other)
    # The driver has seen more than its memory, which went back, has now: it does not run.
    collect(machine, None, other, before, data)
    machine.close()


def run_until(machine: Machine, guest: Guest | None, condition: Callable[[], object]) -> None:
    def holds() -> object:
        if guest is None:
            machine.host.poll()
        else:
            guest.run(machine)
        return condition()

    wait_until(holds)


def collect(
    machine: Machine, guest: Guest | None, chardev: PairChardev, before: bytes, wanted: bytes
) -> None:
    """Wait until the host end has all that is left of ``wanted`` after ``before``."""
    got = bytearray(before)

    def whole() -> bool:
        got.extend(received(chardev.peer))
        return len(got) >= len(wanted)

    run_until(machine, guest, whole)
    assert got == wanted


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_guest_is_told_of_a_host_end_that_is_not_there_any_more(
    tmp_path: Path, comes_back: bool
) -> None:
    path = tmp_path / "port"
    options = SocketOptions(path=str(path), server=True, wait=False)
    guest = Guest(False)
    machine = Machine("mmio", False, guest.ram, chardev=SocketChardev("one", options))
    guest.boot(machine)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        run_until(machine, guest, lambda: guest.host_open)
        saved = machine.front.save()
        machine.close()
    machine = Machine("mmio", False, guest.ram, saved, SocketChardev("two", options))
    run_until(machine, guest, lambda: not guest.host_open)
    if comes_back:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            run_until(machine, guest, lambda: guest.host_open)
    machine.close()


def test_a_call_that_the_loop_has_not_seen_is_in_the_state() -> None:
    """The pump calls the driver in its own thread; whoever saves at once must not lose that."""
    guest = Guest(False)
    chardev = PairChardev()
    machine = Machine("mmio", False, guest.ram, chardev=chardev)
    guest.boot(machine)
    guest.run(machine)
    assert not machine.front.interrupt_level
    used = guest.used()
    chardev.peer.send(b"word")
    wait_until(lambda: guest.used() != used)
    machine.front.save()
    assert machine.front.interrupt_level
    machine.close()


# --- forged and torn states


class Forged:
    """A saved state whose parts can be exchanged, with the device's own state in it."""

    def __init__(self, saved: bytes) -> None:
        self.outer = json.loads(saved[20:])
        self.inner = json.loads(base64.b64decode(self.outer["state"]["device"])[20:])

    def places(self) -> list[tuple[Any, Any]]:
        return [*places(self.outer), *places(self.inner)]

    def pack(self) -> bytes:
        if isinstance(state := self.outer.get("state"), dict) and state.get("device"):
            state["device"] = base64.b64encode(packed(self.inner)).decode()
        return packed(self.outer)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, dict | list):
            yield from places(item)


def packed(fields: Any) -> bytes:
    body = json.dumps(fields).encode()
    return struct.pack("<8sIII", b"VRINGST\n", 1, len(body), zlib.crc32(body)) + body


# Lists and objects are made anew each time: what is put into a state is changed there in turn.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 255, 256, 0xFFFF, 0x10000, 1 << 32, 1 << 63, 1 << 64, 1 << 200]),
    st.sampled_from(["", "open", "closed", "AAAA", "not base64!"]),
    st.sampled_from([[], {}, [1, 2], {"0": 1}]).map(copy.deepcopy),
)
once_saved = functools.cache(saved_by)


def altered(value: Any) -> st.SearchStrategy[Any]:
    """Values that may stand in the place of this one: most are of its type, and some are near."""
    if type(value) is int:
        near = st.integers(-2, 2).map(lambda step: value + step)
        return st.one_of(near, st.integers(0, 47).map(lambda bit: value ^ 1 << bit), VALUES)
    with contextlib.suppress(TypeError, binascii.Error):
        if data := base64.b64decode(value, validate=True):
            places = st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255))
            return st.one_of(st.lists(places, min_size=1, max_size=4).map(patch(data)), VALUES)
    return VALUES


def patch(data: bytes) -> Callable[[list[tuple[int, int]]], str]:
    def patched(changes: list[tuple[int, int]]) -> str:
        changed = bytearray(data)
        for at, value in changes:
            changed[at] = value
        return base64.b64encode(changed).decode()

    return patched


@pytest.mark.parametrize(("kind", "packed_ring"), WAYS)
@settings(max_examples=30)
@given(data=st.data())
def test_a_forged_state_is_a_state_error_or_harmless(
    kind: str, packed_ring: bool, data: st.DataObject
) -> None:
    saved, ram = once_saved(kind, packed_ring)
    forged = Forged(saved)
    for _ in range(data.draw(st.integers(1, 3))):
        where, key = data.draw(st.sampled_from(forged.places()))
        where[key] = data.draw(altered(where[key]))
    try:
        machine = Machine(kind, packed_ring, bytearray(ram), forged.pack())
    except StateError:
        return
    try:
        for index in range(machine.device.num_queues):
            machine.driver.notify(index)
        machine.host.poll()
        machine.front.save()
    finally:
        machine.close()


@pytest.mark.parametrize("register", ["config_vector", "vector"])
def test_vectors_that_a_function_lacks_are_named(register: str) -> None:
    saved, ram = once_saved("pci")
    forged = Forged(saved)
    registers = forged.outer["state"]["function"]["registers"]
    where = registers["driver"] if register == "config_vector" else registers["queues"][3]
    where[register] = 7
    with pytest.raises(StateError, match=rf"{register} is 7; the function has 7 vectors"):
        Machine("pci", False, bytearray(ram), forged.pack())
    where[register] = 0xFFFF  # none
    Machine("pci", False, bytearray(ram), forged.pack()).close()


@given(data=st.data())
def test_a_torn_state_is_a_state_error(data: st.DataObject) -> None:
    saved, ram = once_saved("mmio")
    at = data.draw(st.integers(0, len(saved) - 1))
    torn = saved[:at] + data.draw(st.sampled_from([b"", b"?"])) + saved[at + 1 :]
    if torn != saved:
        with pytest.raises(StateError):
            Machine("mmio", False, bytearray(ram), torn)


async def test_beside_a_loop_a_processor_s_thread_may_save() -> None:
    levels: list[bool] = []

    def make() -> Controller:
        device = Controller(max_ports=2)
        device.add_port(Port(NR, NAME, NullChardev("null", NullOptions())))
        return device

    first = make()
    await first.start()
    mmio = InProcessMmio(LoopHost(), first, None, interrupt=levels.append)
    mmio.write(0x70, 1, 4)  # ACKNOWLEDGE
    saved = await asyncio.to_thread(mmio.save)
    mmio.close()
    await first.aclose()
    second = make()
    mmio = await InProcessMmio.restore(saved, LoopHost(), second, None, interrupt=levels.append)
    assert second.started
    assert mmio.read(0x70, 4) == 1
    mmio.close()
    await second.aclose()
