from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vring_serial.errors import LocalProtocolError
from vring_serial.proto.console import MAX_NAME, NO_PORT, ControlEvent, ControlMessage, Size
from vring_serial.proto.control import (
    DEVICE_TRANSITIONS,
    DRIVER_TRANSITIONS,
    ControlDevice,
    ControlDriver,
    DriverInput,
    DriverPortState,
    Outbox,
    PeerReady,
    PortAdded,
    PortClosed,
    PortInput,
    PortIsConsole,
    PortNamed,
    PortOpened,
    PortReady,
    PortRemoved,
    PortResized,
    PortState,
    Refused,
)

E = ControlEvent


def drain(outbox: Outbox) -> list[ControlMessage]:
    messages = []
    while (data := outbox.peek()) is not None:
        messages.append(ControlMessage.unpack(data))
        outbox.sent()
    return messages


def said(id: int, event: int, value: int = 1) -> bytes:
    return ControlMessage(id, event, value).pack()


def device_with(*numbers: int, console: bool = False, max_ports: int = 8) -> ControlDevice:
    device = ControlDevice(max_ports)
    for nr in numbers:
        device.add_port(nr, b"org.test.%d" % nr, console=console and nr == 0)
    return device


# --- the device -----------------------------------------------------------------------------------


def test_the_device_table_answers_every_input_in_every_state():
    assert set(DEVICE_TRANSITIONS) == set(itertools.product(PortState, PortInput))


def test_the_sequence_of_linux_at_boot():
    device = device_with(0, 1, console=True)
    device.set_host_open(1, True)
    device.set_size(0, 80, 25)
    assert not device.outbox
    assert device.receive_message(said(NO_PORT, E.DEVICE_READY)) == [PeerReady(True)]
    assert drain(device.outbox) == [
        ControlMessage(0, E.PORT_ADD, 1),
        ControlMessage(1, E.PORT_ADD, 1),
    ]
    assert device.receive_message(said(0, E.PORT_READY)) == [PortReady(0, True)]
    assert drain(device.outbox) == [
        ControlMessage(0, E.CONSOLE_PORT, 1),
        ControlMessage(0, E.PORT_NAME, 1, b"org.test.0"),
        ControlMessage(0, E.RESIZE, 0, Size(80, 25).pack()),
    ]
    assert device.receive_message(said(0, E.PORT_OPEN)) == [PortOpened(0)]
    assert device.receive_message(said(1, E.PORT_READY)) == [PortReady(1, True)]
    assert drain(device.outbox) == [
        ControlMessage(1, E.PORT_NAME, 1, b"org.test.1"),
        ControlMessage(1, E.PORT_OPEN, 1),
    ]
    assert device.receive_message(said(1, E.PORT_OPEN)) == [PortOpened(1)]
    assert device.receive_message(said(1, E.PORT_OPEN, 0)) == [PortClosed(1)]
    assert device.port_state(1) is PortState.CLOSED
    assert not device.outbox


def test_linux_resuming_is_answered_with_the_host_ends_state_though_it_says_no_device_ready():
    device = device_with(1, 2)
    device.set_host_open(1, True)
    device.set_host_open(2, True)
    device.receive_message(said(NO_PORT, E.DEVICE_READY))
    device.receive_message(said(1, E.PORT_READY))
    device.receive_message(said(1, E.PORT_OPEN))
    assert device.reset() == [PortClosed(1)]
    assert not device.driver_ready
    assert device.receive_message(said(1, E.PORT_READY)) == [PortReady(1, True)]
    assert ControlMessage(1, E.PORT_OPEN, 1) in drain(device.outbox)
    assert device.receive_message(said(1, E.PORT_OPEN)) == [PortOpened(1)]
    assert device.driver_ready
    # and some say only that the port is open
    assert device.receive_message(said(2, E.PORT_OPEN)) == [PortOpened(2)]
    assert drain(device.outbox) == [ControlMessage(2, E.PORT_OPEN, 1)]
    # a port added later is announced to it
    device.add_port(3)
    assert drain(device.outbox) == [ControlMessage(3, E.PORT_ADD, 1)]


def test_windows_repeats_itself_at_every_power_up():
    device = device_with(1)
    device.set_host_open(1, True)
    for power_up in range(3):
        events = device.receive_message(said(NO_PORT, E.DEVICE_READY))
        assert events == [PeerReady(True)]
        assert device.receive_message(said(1, E.PORT_READY)) == [PortReady(1, True)]
        assert device.receive_message(said(1, E.PORT_OPEN)) == [PortOpened(1)]
        assert drain(device.outbox) == [
            ControlMessage(1, E.PORT_ADD, 1),
            ControlMessage(1, E.PORT_NAME, 1, b"org.test.1"),
            ControlMessage(1, E.PORT_OPEN, 1),
        ], power_up
        assert device.receive_message(said(1, E.PORT_OPEN, 0)) == [PortClosed(1)]


def test_a_second_device_ready_closes_what_was_open():
    device = device_with(1)
    device.receive_message(said(NO_PORT, E.DEVICE_READY))
    device.receive_message(said(1, E.PORT_READY))
    device.receive_message(said(1, E.PORT_OPEN))
    assert device.receive_message(said(NO_PORT, E.DEVICE_READY)) == [PeerReady(True), PortClosed(1)]
    assert device.port_state(1) is PortState.ADDED


def test_a_driver_that_failed_hears_of_nothing():
    device = device_with(1)
    assert device.receive_message(said(NO_PORT, E.DEVICE_READY, 0)) == [PeerReady(False)]
    device.add_port(2)
    assert not device.outbox
    device.receive_message(said(NO_PORT, E.DEVICE_READY))
    assert device.receive_message(said(2, E.PORT_READY, 0)) == [PortReady(2, False)]
    drain(device.outbox)
    device.set_host_open(2, True)
    assert not device.outbox


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "0 bytes"),
        (b"\1\0\0\0\3\0\1", "7 bytes"),
        (said(5, E.PORT_READY), "no such port"),
        (said(0xDEADBEEF, E.PORT_OPEN), "no such port"),
        (said(1, E.PORT_ADD), "not an event that a driver sends"),
        (said(1, 4711), "event 4711"),
    ],
)
def test_what_makes_no_sense_is_refused_and_everything_else_goes_on(data, why):
    device = device_with(1)
    (event,) = device.receive_message(data)
    assert isinstance(event, Refused)
    assert why in event.why
    assert not device.outbox
    device.receive_message(said(NO_PORT, E.DEVICE_READY))
    assert device.receive_message(said(1, E.PORT_READY) + b"more") == [PortReady(1, True)]


def test_names_and_numbers_of_ports_are_checked():
    device = device_with(1)
    for nr, name in [(1, b"a"), (8, b"a"), (-1, b"a"), (2, b"org.test.1"), (2, b"a\0")]:
        with pytest.raises(LocalProtocolError, match=f"port {nr}"):
            device.add_port(nr, name)
    with pytest.raises(LocalProtocolError, match=str(MAX_NAME)):
        device.add_port(2, bytes(MAX_NAME + 1))
    device.add_port(2)
    device.add_port(3)  # names that are empty need not differ
    with pytest.raises(LocalProtocolError, match="no port 4"):
        device.remove_port(4)
    with pytest.raises(LocalProtocolError, match="max_ports"):
        ControlDevice(0)


def test_a_number_is_used_again_after_the_removal_was_announced():
    device = device_with(1)
    device.receive_message(said(NO_PORT, E.DEVICE_READY))
    drain(device.outbox)
    device.receive_message(said(1, E.PORT_READY))
    device.receive_message(said(1, E.PORT_OPEN))
    device.remove_port(1)
    device.add_port(1, b"another")
    # what the driver still says about the first port is not about the second
    (event,) = device.receive_message(said(1, E.PORT_OPEN))
    assert isinstance(event, Refused)
    assert drain(device.outbox) == [
        ControlMessage(1, E.PORT_REMOVE, 1),
        ControlMessage(1, E.PORT_ADD, 1),
    ]
    assert device.receive_message(said(1, E.PORT_READY)) == [PortReady(1, True)]
    assert drain(device.outbox) == [ControlMessage(1, E.PORT_NAME, 1, b"another")]


def test_a_port_that_the_driver_never_heard_of_goes_without_a_word():
    device = device_with(1)
    device.remove_port(1)
    device.add_port(1)
    device.receive_message(said(NO_PORT, E.DEVICE_READY))
    device.remove_port(1)
    assert not device.outbox
    # but one that it knew before it repeated itself
    device.add_port(2)
    drain(device.outbox)
    device.receive_message(said(NO_PORT, E.DEVICE_READY))
    device.remove_port(2)
    assert drain(device.outbox) == [ControlMessage(2, E.PORT_REMOVE, 1)]


def test_toggles_collapse_to_the_last_two():
    device = device_with(1)
    device.receive_message(said(NO_PORT, E.DEVICE_READY))
    device.receive_message(said(1, E.PORT_READY))
    drain(device.outbox)
    for is_open in (True, False, True):
        device.set_host_open(1, is_open)
    assert [m.value for m in drain(device.outbox)] == [0, 1]
    for is_open in (False, True, False):
        device.set_host_open(1, is_open)
    assert [m.value for m in drain(device.outbox)] == [1, 0]


def test_sizes_that_nobody_saw_are_not_sent():
    device = device_with(0, 1, console=True)
    device.receive_message(said(NO_PORT, E.DEVICE_READY))
    device.receive_message(said(0, E.PORT_READY))
    device.receive_message(said(1, E.PORT_READY))
    drain(device.outbox)
    device.set_size(1, 80, 25)  # no console
    for cols in range(100, 200):
        device.set_size(0, cols, 50)
    assert drain(device.outbox) == [ControlMessage(0, E.RESIZE, 0, Size(199, 50).pack())]


@settings(max_examples=200)
@given(st.lists(st.binary(min_size=0, max_size=12), max_size=30))
def test_no_bytes_make_the_device_fail(messages):
    device = device_with(0, 1, 2, console=True)
    for message in messages:
        device.receive_message(message)
    assert len(device.outbox) <= 3 * Outbox.MAX_PER_ID


class DeviceMachine(RuleBasedStateMachine):
    """A device between a host and a driver of the worst manners, who gives buffers rarely.

    What the driver has been sent must be enough to know what the device knows: after everything
    that waits is delivered, the last PORT_OPEN is the host end's state, and of every number the
    driver knows whether there is a port. What waits is bounded.
    """

    NUMBERS = (0, 1, 2)

    def __init__(self) -> None:
        super().__init__()
        self.device = ControlDevice(3)
        self.ports: dict[int, bool] = {}  # host open
        self.known: dict[int, bool | None] = {}  # as the driver knows: host open, None if unsaid

    def deliver(self, count: int) -> None:
        for _ in range(count):
            data = self.device.outbox.peek()
            if data is None:
                return
            message = ControlMessage.unpack(data)
            self.device.outbox.sent()
            match message.event:
                case E.PORT_ADD:
                    self.known.setdefault(message.id, None)
                case E.PORT_REMOVE:
                    assert message.id in self.known, "removed what was never added"
                    del self.known[message.id]
                case E.PORT_OPEN:
                    assert message.id in self.known
                    self.known[message.id] = bool(message.value)
                case _:
                    assert message.id in self.known, "described before it was added"

    @rule(nr=st.sampled_from(NUMBERS))
    def add(self, nr: int) -> None:
        if nr not in self.ports:
            self.device.add_port(nr, b"p%d" % nr, console=nr == 0)
            self.ports[nr] = False

    @rule(nr=st.sampled_from(NUMBERS))
    def remove(self, nr: int) -> None:
        if self.ports.pop(nr, None) is not None:
            self.device.remove_port(nr)

    @rule(nr=st.sampled_from(NUMBERS), is_open=st.booleans())
    def host(self, nr: int, is_open: bool) -> None:
        if nr in self.ports:
            self.device.set_host_open(nr, is_open)
            self.ports[nr] = is_open

    @rule(nr=st.sampled_from(NUMBERS), cols=st.integers(0, 0xFFFF))
    def resize(self, nr: int, cols: int) -> None:
        if nr in self.ports:
            self.device.set_size(nr, cols, 25)

    @rule(event=st.sampled_from([E.PORT_READY, E.PORT_OPEN]), value=st.integers(0, 1))
    @precondition(lambda self: self.known)
    def driver_speaks(self, event: ControlEvent, value: int) -> None:
        for nr in self.known:
            self.device.receive_message(said(nr, event, value))

    @rule(id=st.integers(3, 0xFFFFFFFF), event=st.integers(0, 0xFFFF), value=st.integers(0, 3))
    def driver_raves(self, id: int, event: int, value: int) -> None:
        if event != E.DEVICE_READY:
            self.device.receive_message(said(id, event, value))

    @rule()
    def driver_starts(self) -> None:
        self.device.receive_message(said(NO_PORT, E.DEVICE_READY))

    @rule()
    def driver_resets(self) -> None:
        self.device.reset()
        self.known.clear()

    @rule(count=st.integers(1, 4))
    def buffers(self, count: int) -> None:
        self.deliver(count)

    @invariant()
    def bounded(self) -> None:
        assert len(self.device.outbox) <= len(self.NUMBERS) * Outbox.MAX_PER_ID

    @rule()
    def everything_delivered(self) -> None:
        self.deliver(1000)
        assert not self.device.outbox
        if self.device.driver_ready:
            assert set(self.known) <= set(self.ports)
        for nr, known in self.known.items():
            if self.device.port_state(nr) in (PortState.READY, PortState.OPEN, PortState.CLOSED):
                assert bool(known) == self.ports[nr]


def test_a_close_that_waited_when_the_driver_repeated_itself_is_not_lost():
    device = device_with(1)
    device.set_host_open(1, True)
    device.receive_message(said(NO_PORT, E.DEVICE_READY))
    device.receive_message(said(1, E.PORT_READY))
    drain(device.outbox)
    device.set_host_open(1, False)
    device.receive_message(said(NO_PORT, E.DEVICE_READY))
    device.receive_message(said(1, E.PORT_READY))
    assert drain(device.outbox)[-1] == ControlMessage(1, E.PORT_OPEN, 0)


DeviceMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
test_whatever_happens_the_driver_can_know_all_and_little_waits = DeviceMachine.TestCase


# --- the driver -----------------------------------------------------------------------------------


def sent_by_driver(driver: ControlDriver) -> list[tuple[int, int, int]]:
    return [(m.id, m.event, m.value) for m in drain(driver.outbox)]


def driver_with_port(nr: int = 1) -> ControlDriver:
    driver = ControlDriver(8)
    driver.receive_message(said(nr, E.PORT_ADD))
    driver.port_ready(nr)
    drain(driver.outbox)
    return driver


def test_the_driver_says_what_linux_says():
    driver = ControlDriver(2)
    driver.start()
    assert driver.receive_message(said(1, E.PORT_ADD)) == [PortAdded(1)]
    driver.port_ready(1)
    assert driver.receive_message(ControlMessage(1, E.PORT_NAME, 1, b"org.x\0").pack()) == [
        PortNamed(1, b"org.x")
    ]
    assert driver.receive_message(said(1, E.PORT_OPEN)) == [PortOpened(1)]
    driver.open(1)
    driver.close(1)
    assert sent_by_driver(driver) == [
        (NO_PORT, E.DEVICE_READY, 1),
        (1, E.PORT_READY, 1),
        (1, E.PORT_OPEN, 1),
        (1, E.PORT_OPEN, 0),
    ]
    # the first name wins, as with Linux
    assert driver.receive_message(ControlMessage(1, E.PORT_NAME, 1, b"later").pack()) == []
    assert driver.ports[1].name == b"org.x"
    assert driver.receive_message(said(1, E.PORT_OPEN)) == []
    assert driver.receive_message(said(1, E.PORT_OPEN, 0)) == [PortClosed(1)]


def test_the_driver_answers_a_repeated_port_add_with_port_ready():
    driver = driver_with_port()
    assert driver.receive_message(said(1, E.PORT_ADD)) == []
    assert sent_by_driver(driver) == [(1, E.PORT_READY, 1)]


def test_a_console_is_opened_by_the_driver_itself_and_follows_sizes():
    driver = driver_with_port(0)
    size = ControlMessage(0, E.RESIZE, 0, Size(132, 43).pack()).pack()
    assert driver.receive_message(size) == []  # no console yet
    assert driver.receive_message(said(0, E.CONSOLE_PORT)) == [PortIsConsole(0)]
    assert driver.receive_message(said(0, E.CONSOLE_PORT)) == []
    assert sent_by_driver(driver) == [(0, E.PORT_OPEN, 1)]
    assert driver.receive_message(size) == [PortResized(0, 132, 43)]
    (event,) = driver.receive_message(size[:-1])
    assert isinstance(event, Refused)


def test_a_removed_port_is_forgotten_with_what_waited_about_it():
    driver = driver_with_port()
    driver.open(1)
    assert driver.receive_message(said(1, E.PORT_REMOVE)) == [PortRemoved(1)]
    assert not driver.outbox
    assert not driver.ports
    with pytest.raises(LocalProtocolError, match="CLOSE while it is ABSENT"):
        driver.close(1)


def test_a_port_that_cannot_be_set_up_is_refused_to_the_device():
    driver = ControlDriver(8)
    driver.receive_message(said(1, E.PORT_ADD))
    driver.port_ready(1, False)
    assert sent_by_driver(driver) == [(1, E.PORT_READY, 0)]
    assert not driver.ports


def test_the_driver_resumes_as_linux():
    driver = driver_with_port()
    driver.receive_message(said(2, E.PORT_ADD))
    driver.port_ready(2)
    driver.open(2)
    driver.receive_message(said(1, E.PORT_OPEN))
    drain(driver.outbox)
    driver.resume()
    assert sent_by_driver(driver) == [
        (1, E.PORT_READY, 1),
        (2, E.PORT_READY, 1),
        (2, E.PORT_OPEN, 1),
    ]
    assert driver.receive_message(said(1, E.PORT_OPEN)) == [PortOpened(1)]


def test_what_another_process_was_about_to_say_is_said():
    old = ControlDevice(8)
    for nr in (1, 2):
        old.add_port(nr, b"p%d" % nr, console=nr == 2)
    old.receive_message(said(NO_PORT, E.DEVICE_READY))
    drain(old.outbox)
    old.receive_message(said(1, E.PORT_READY))
    old.receive_message(said(2, E.PORT_READY))
    old.set_size(2, 80, 25)
    old.remove_port(1)
    old.add_port(1, b"p1")
    new = ControlDevice(8)
    for nr in (1, 2):
        new.add_port(nr, b"p%d" % nr, console=nr == 2)
    new.resume(old.state)
    assert [(m.id, m.event) for m in drain(new.outbox)] == [
        (2, E.CONSOLE_PORT),
        (2, E.PORT_NAME),
        (2, E.RESIZE),
        (1, E.PORT_REMOVE),
        (1, E.PORT_ADD),
        (2, E.PORT_OPEN),
    ]


def test_what_nobody_of_ours_would_say_is_not_said():
    old = ControlDevice(8)
    old.add_port(1, b"p1")
    old.receive_message(said(NO_PORT, E.DEVICE_READY))
    drain(old.outbox)
    old.receive_message(said(1, E.PORT_READY))
    drain(old.outbox)
    for number, (nr, event) in enumerate([(9, E.PORT_OPEN), (1, E.DEVICE_READY), (1, 77)]):
        old.state.waiting[number] = ControlMessage(nr, event, 1)
    new = ControlDevice(8)
    new.add_port(1, b"p1")
    new.resume(old.state)
    assert [(m.id, m.event) for m in drain(new.outbox)] == [(1, E.PORT_OPEN)]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"short", "5 bytes"),
        (said(8, E.PORT_ADD), "0..7"),
        (said(2, E.PORT_OPEN), "no such port"),
        (said(1, E.PORT_READY), "not an event that a device sends"),
        (ControlMessage(1, E.PORT_NAME, 1, b"x" * 5000).pack(), "5000 bytes"),
    ],
)
def test_what_a_device_may_not_say_is_refused(data, why):
    driver = driver_with_port()
    (event,) = driver.receive_message(data)
    assert isinstance(event, Refused)
    assert why in event.why


def test_messages_between_port_add_and_its_answer_are_refused():
    driver = ControlDriver(8)
    driver.receive_message(said(1, E.PORT_ADD))
    (event,) = driver.receive_message(said(1, E.CONSOLE_PORT))
    assert isinstance(event, Refused)
    assert not driver.ports[1].console


def test_every_state_of_a_driver_can_be_left():
    reached = {state for state, _ in DRIVER_TRANSITIONS.values()} | {DriverPortState.ABSENT}
    assert reached == set(DriverPortState)
    assert {given for _, given in DRIVER_TRANSITIONS} == set(DriverInput)
    for state in DriverPortState:
        assert any(
            before is state and after is not state
            for (before, _), (after, _) in DRIVER_TRANSITIONS.items()
        )


@settings(max_examples=200)
@given(
    st.lists(
        st.builds(
            ControlMessage,
            st.integers(0, 3),
            st.integers(0, 8),
            st.integers(0, 1),
            st.binary(max_size=6),
        ),
        max_size=40,
    )
)
def test_driver_and_device_agree_after_any_quarrel(messages):
    """A device's words, distorted by strangers, never break the driver, nor fill its memory."""
    driver = ControlDriver(3)
    for message in messages:
        for event in driver.receive_message(message.pack()):
            if isinstance(event, PortAdded):
                driver.port_ready(event.nr)
    assert len(driver.outbox) <= 3 * Outbox.MAX_PER_ID
    device = device_with(0, 1, 2, max_ports=3)
    for nr in list(driver.ports):
        driver.receive_message(said(nr, E.PORT_REMOVE))
    driver.outbox.clear()
    driver.start()
    exchange(device, driver)
    assert all(device.port_state(nr) in (PortState.READY, PortState.OPEN) for nr in range(3))
    assert {nr: port.name for nr, port in driver.ports.items()} == {
        nr: b"org.test.%d" % nr for nr in range(3)
    }


def exchange(device: ControlDevice, driver: ControlDriver) -> None:
    """Carry messages both ways until both are silent."""
    while device.outbox or driver.outbox:
        for message in drain(driver.outbox):
            assert not any(isinstance(e, Refused) for e in device.receive_message(message.pack()))
        for message in drain(device.outbox):
            for event in driver.receive_message(message.pack()):
                assert not isinstance(event, Refused)
                if isinstance(event, PortAdded):
                    driver.port_ready(event.nr)
