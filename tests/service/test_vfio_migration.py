"""A guest is moved from one vfio-user server to another while its bytes go out of four ports."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.support.keeper import Kept, kept, socket_ports
from tests.support.vfio_guest import VfioGuest
from tests.support.vfio_migration import VfioMigration
from tests.support.waiting import until
from vring import LOG_PAGE
from vring_serial.proto.vfio_user import VfioUserError
from vring_serial.proto.vfio_user_features import (
    FeatureIndex,
    FeatureMethod,
    LoggingReport,
    MigrationState,
)
from vring_serial.transport.state_memory import MAX_STATE

PORTS = 4
#: What a client may send at once.
LARGEST_PIECE = 1 << 20
#: A prime length: no lost or doubled power of two of bytes goes unnoticed.
PRIME = 65_521
PATTERN = random.Random(11).randbytes(PRIME) * 3
LAYOUTS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


class Stream:
    """What a guest sends through one port, and its host ends get, one after another."""

    def __init__(self) -> None:
        self.sent = self.received = 0

    async def send(self, writer: asyncio.StreamWriter, chance: random.Random) -> None:
        while True:
            start = self.sent % PRIME
            data = PATTERN[start : start + chance.randrange(1, 60_000)]
            writer.write(data)
            self.sent += len(data)
            await writer.drain()
            await asyncio.sleep(0)

    async def receive(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(1 << 17):
            start = self.received % PRIME
            assert data == (PATTERN * 2)[start : start + len(data)], f"after {self.received}"
            self.received += len(data)

    async def moves(self) -> None:
        """Wait until bytes have come."""
        before = self.received
        await until(lambda: self.received > before, lambda: f"{before} bytes, and no more")


async def server(stack: AsyncExitStack, directory: Path, *options: str, ports: int = PORTS) -> Kept:
    directory.mkdir()
    words = [*socket_ports(range(1, ports + 1)), *options]
    return await stack.enter_async_context(kept(directory, *words, protocol="vfio-user"))


@LAYOUTS
@pytest.mark.parametrize("killed", [False, True], ids=["", "killed"])
async def test_a_guest_is_moved_under_traffic(tmp_path: Path, packed: bool, killed: bool) -> None:
    options = ["--packed"] if packed else []
    chance = random.Random(1)
    async with AsyncExitStack() as stack:
        source = await server(stack, tmp_path / "a", *options)
        target = await server(stack, tmp_path / "b", *options)
        guest = await stack.enter_async_context(VfioGuest(str(source.path), PORTS, packed=packed))
        streams = [Stream() for _ in range(PORTS)]
        writers, receiving, hosts = [], [], []
        for nr, stream in enumerate(streams, 1):
            reader, host_writer = await source.connect(nr)
            hosts.append(host_writer)
            port = await guest.wait_port(name=f"org.example.data{nr}")
            guest_reader, writer = await port.open()
            writers.append((guest_reader, writer))
            host_writer.write(b"in\n")
            assert await guest_reader.readline() == b"in\n"
            receiving.append(asyncio.create_task(stream.receive(reader)))
        sending = [
            asyncio.create_task(stream.send(writer, chance))
            for stream, (_, writer) in zip(streams, writers, strict=True)
        ]
        await asyncio.gather(*(stream.moves() for stream in streams))
        memory = VfioMigration(guest)
        stack.callback(memory.close)
        memory.start()
        for _ in range(4):
            await asyncio.gather(*(stream.moves() for stream in streams))
            for host in hosts:
                host.write(b"x" * 5000 + b"\n")
            for reader, _ in writers:
                assert len(await reader.readline()) == 5001
            memory.copy_round()
            if killed:
                await source.kill_until_served()
        assert memory.copied > 4
        ends = [await target.connect(nr) for nr in range(1, PORTS + 1)]
        await target.logged("opened by the host", PORTS)
        guest.set_state(MigrationState.STOP_COPY)
        if killed:
            await source.kill()
        state = guest.read_state()
        memory.finish()
        guest.attach(str(target.path))
        guest.set_state(MigrationState.RESUMING)
        if killed:
            guest.write_state(state[:500])
            await target.kill()
            guest.write_state(state[500:])
        else:
            guest.write_state(state)
        guest.set_state(MigrationState.RUNNING)
        assert await source.stop() == 0
        await asyncio.gather(*receiving)  # the old host ends are read to their end
        for host in hosts:
            host.close()
        hosts, receiving = [], []
        for (reader, host_writer), stream in zip(ends, streams, strict=True):
            hosts.append(host_writer)
            receiving.append(asyncio.create_task(stream.receive(reader)))
        await asyncio.gather(*(stream.moves() for stream in streams))
        for host, (guest_reader, _) in zip(hosts, writers, strict=True):
            host.write(b"again\n")
            assert await asyncio.wait_for(guest_reader.readline(), 30) == b"again\n"
        for task in sending:
            task.cancel()
        await until(lambda: all(s.sent == s.received for s in streams), "bytes are missing")
        for _, writer in writers:
            writer.close()
        for host in hosts:
            host.close()
        await asyncio.gather(*receiving, return_exceptions=True)
    assert "warning" not in source.log + target.log


async def carries(guest: VfioGuest, server: Kept, text: bytes) -> None:
    """Check that bytes go both ways through port 1.

    The guest hears of the host's end before, and of its leaving after that: a guest that opens the
    port with one client's leaving still to be told reads that client's end of file, not the next
    one's bytes.
    """
    reader, writer = await server.connect(1)
    port = await guest.wait_port(name="org.example.data1")
    await port.wait_host()
    guest_reader, guest_writer = await port.open()
    for ours, theirs in ((writer, guest_reader), (guest_writer, reader)):
        ours.write(text + b"\n")
        assert await asyncio.wait_for(theirs.readline(), 30) == text + b"\n"
    guest_writer.close()
    writer.close()
    await port.wait_host(connected=False)
    await server.logged("closed by the guest", server.log.count("opened by the guest"))


def states(guest: VfioGuest) -> MigrationState:
    return MigrationState(guest.feature(FeatureMethod.GET, FeatureIndex.MIG_DEVICE_STATE)[0])


def refused(guest: VfioGuest, state: int) -> int:
    """The error number with which a state is refused."""
    with pytest.raises(VfioUserError) as caught:
        guest.set_state(state)  # type: ignore[arg-type]
    return caught.value.errno


async def test_a_move_may_be_given_up_at_every_step(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        source = await server(stack, tmp_path / "a")
        guest = await stack.enter_async_context(VfioGuest(str(source.path), PORTS))
        await carries(guest, source, b"at first")
        memory = VfioMigration(guest)
        stack.callback(memory.close)
        memory.start()
        memory.copy_round()
        for way in (
            [MigrationState.STOP],
            [MigrationState.STOP_COPY],
            [MigrationState.STOP, MigrationState.STOP_COPY, MigrationState.STOP],
        ):
            for state in way:
                guest.set_state(state)
                assert states(guest) is state
                if state is MigrationState.STOP_COPY:
                    assert guest.read_state(64) == guest_state(guest)
            guest.set_state(MigrationState.RUNNING)
            await carries(guest, source, way[-1].name.encode())
        memory.end()
        with pytest.raises(VfioUserError, match="error 22"):
            memory.copy_round()
        await carries(guest, source, b"at last")
        assert "warning" not in source.log.replace("warning vfio-user", "", 1)


def guest_state(guest: VfioGuest) -> bytes:
    """The state, once more from its beginning."""
    guest.set_state(MigrationState.STOP)
    guest.set_state(MigrationState.STOP_COPY)
    return guest.read_state()


async def test_states_that_are_no_way_are_refused(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        source = await server(stack, tmp_path / "a")
        guest = await stack.enter_async_context(VfioGuest(str(source.path), PORTS))
        for state in (
            MigrationState.ERROR,
            MigrationState.RUNNING_P2P,
            MigrationState.PRE_COPY,
            MigrationState.PRE_COPY_P2P,
            0xABCD,
        ):
            assert refused(guest, state) == errno.EINVAL
        assert states(guest) is MigrationState.RUNNING
        with pytest.raises(VfioUserError, match="error 22"):
            guest.read_state()
        with pytest.raises(VfioUserError, match="error 22"):
            guest.write_state(b"x")
        await carries(guest, source, b"it goes on")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda state: b"", "0 bytes are no saved state"),
        (lambda state: state[:-1], "it is torn"),
        (lambda state: state[:100] + b"\0" + state[101:], "it is torn"),
        (lambda state: b"x" * 500, "it is no saved state: the first bytes are others"),
    ],
)
async def test_a_state_that_does_not_fit_leaves_a_device_that_must_be_reset(
    tmp_path: Path, change: Callable[[bytes], bytes], cause: str
) -> None:
    async with AsyncExitStack() as stack:
        source = await server(stack, tmp_path / "a")
        async with VfioGuest(str(source.path), PORTS) as guest:
            guest.set_state(MigrationState.STOP_COPY)
            state = change(guest.read_state())
            guest.set_state(MigrationState.RESUMING)
            guest.write_state(state)
            assert refused(guest, MigrationState.RUNNING) == errno.EINVAL
            assert states(guest) is MigrationState.ERROR
            assert refused(guest, MigrationState.RUNNING) == errno.EINVAL
        await source.logged(f"the state is not taken: {cause}")
        async with VfioGuest(str(source.path), PORTS) as guest:
            await carries(guest, source, b"the next client")


async def test_the_largest_state_comes_in_pieces_that_no_socket_holds(tmp_path: Path) -> None:
    """A worker dies between them, and while one is on its way."""
    async with AsyncExitStack() as stack:
        source = await server(stack, tmp_path / "a", ports=1)
        guest = await stack.enter_async_context(VfioGuest(str(source.path), 1))
        await carries(guest, source, b"at first")
        guest.set_state(MigrationState.STOP_COPY)
        state = guest.read_state()
        guest.set_state(MigrationState.RESUMING)
        state += bytes(MAX_STATE - len(state))
        for start in range(0, MAX_STATE, LARGEST_PIECE):
            victim = source.kill_now() if start >> 20 & 1 else None
            guest.write_state(state[start : start + LARGEST_PIECE], LARGEST_PIECE)
            if victim is not None:
                await source.replaced(victim)
                await source.logged("serving;", source.kills + 1)
        with pytest.raises(VfioUserError, match=f"error {errno.ENOSPC}"):
            guest.write_state(b"x")
        guest.set_state(MigrationState.RUNNING)
        await carries(guest, source, b"again")


async def test_a_device_with_other_ports_or_options_takes_no_state(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        source = await server(stack, tmp_path / "a")
        async with VfioGuest(str(source.path), PORTS) as guest:
            guest.set_state(MigrationState.STOP_COPY)
            state = guest.read_state()
        for number, (ports, options, cause) in enumerate(
            [
                (PORTS + 1, [], "there is no port 5 in it"),
                (
                    PORTS,
                    ["--max-ports", "8", "--vectors", "65"],
                    "it is of a device with max_ports",
                ),
                (PORTS, ["--transitional"], "transitional is False in the state, True here"),
                (PORTS, ["--vectors", "70"], "the number of MSI-X vectors is"),
            ]
        ):
            other = await server(stack, tmp_path / f"b{number}", *options, ports=ports)
            async with VfioGuest(str(other.path), 1) as guest:
                guest.set_state(MigrationState.RESUMING)
                guest.write_state(state)
                assert refused(guest, MigrationState.STOP) == errno.EINVAL
            await other.logged(f"the state is not taken: {cause}")
            async with VfioGuest(str(other.path), 1) as guest:
                await carries(guest, other, b"the next client")


async def test_reports_are_of_what_is_mapped(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        source = await server(stack, tmp_path / "a")
        guest = await stack.enter_async_context(VfioGuest(str(source.path), PORTS))
        VfioMigration(guest).start()
        start, size = guest.ram.guest_addr, guest.ram.size

        def report(address: int, length: int, page_size: int) -> bytes:
            asked = LoggingReport(address, length, page_size).pack()
            data = guest.feature(FeatureMethod.GET, FeatureIndex.DMA_LOGGING_REPORT, asked)
            return LoggingReport.unpack(data).bitmap

        for address, length, page_size, error in (
            (start - LOG_PAGE, size, LOG_PAGE, errno.ENOENT),
            (start, size + 1, LOG_PAGE, errno.ENOENT),
            (start, size, 3 * LOG_PAGE, errno.EINVAL),
            (start, size, 1, errno.EINVAL),
            (start, 0, LOG_PAGE, errno.EINVAL),
        ):
            with pytest.raises(VfioUserError, match=f"error {error}"):
                report(address, length, page_size)
        await carries(guest, source, b"marks")
        assert any(report(start, size, LOG_PAGE))
        assert not any(report(start, size, LOG_PAGE))
        await source.kill_until_served()
        marked = report(start, size, LOG_PAGE)
        assert marked == b"\xff" * len(marked), "what the worker had marked is not known"
        assert len(report(start, size, 1 << 40)) == 8
