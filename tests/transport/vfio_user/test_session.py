"""What a client asks of a device, in the order in which VMMs do."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from tests.support.leaks import held
from tests.support.vfio_client import BUFFERS
from tests.support.waiting import wait_until
from vring_serial.device.testing import ANY_FEATURE
from vring_serial.proto.framing import Empty
from vring_serial.proto.vfio_user import request
from vring_serial.proto.vfio_user_dma import DmaFlag, DmaMap, DmaUnmap, UnmapFlag
from vring_serial.proto.vfio_user_regions import (
    RegionFlag,
    RegionIndex,
    RegionInfo,
    RegionIoFds,
    RegionRead,
    RegionWrite,
    WriteMulti,
    WriteMultiDone,
)
from vring_serial.proto.vfio_user_version import Capabilities, Version
from vring_serial.proto.vfio_user_wire import (
    Command,
    DeviceFlag,
    DeviceInfo,
    IrqFlag,
    IrqIndex,
    IrqInfo,
    IrqSet,
    IrqSetFlag,
)
from vring_serial.proto.virtio import Status

NOTIFY_BAR = 4
NOTIFY = 0x3000
TRIGGER = IrqSetFlag.ACTION_TRIGGER
MEMORY_SIZE = 1 << 20


# --- negotiation


def test_the_reply_to_version_is_a_subset_and_no_longer(client: Any) -> None:
    qemu = (
        b'{"capabilities":{"migration":{"max_bitmap_size":268435456,"pgsize":4096},'
        b'"pgsizes":4096,"max_msg_fds":16,"max_dma_maps":65535,"max_data_xfer_size":1048576,'
        b'"write_multiple":true}}\0'
    )
    answer = client.answer(client.send_raw(Command.VERSION, struct.pack("=HH", 0, 0) + qemu))
    assert len(answer.payload) <= 4 + len(qemu)
    assert answer.payload.endswith(b"}\0")
    agreed = answer.decode_reply(Version).capabilities
    assert agreed is not None
    assert agreed.named == {
        "pgsizes",
        "max_msg_fds",
        "max_dma_maps",
        "max_data_xfer_size",
        "write_multiple",
    }
    assert agreed.max_msg_fds == 16
    assert agreed.max_dma_maps <= 65535
    assert agreed.pgsizes == 4096
    assert agreed.write_multiple


def test_a_client_without_capabilities_gets_none(client: Any) -> None:
    assert client.negotiate(None) == Version(0, 0, None)


def test_a_later_minor_version_is_answered_with_ours(client: Any) -> None:
    # Cloud Hypervisor's client says 0.1, and refuses a reply without capabilities.
    proposed = Capabilities(max_msg_fds=1, named=frozenset({"max_msg_fds"}))
    answer = client.ask(Command.VERSION, Version(0, 1, proposed), Version)
    assert (answer.major, answer.minor) == (0, 0)
    assert answer.capabilities.named == {"max_msg_fds"}


def test_what_the_device_is(client: Any) -> None:
    client.negotiate()
    info = client.ask(Command.DEVICE_GET_INFO, DeviceInfo(argsz=32), DeviceInfo)
    assert info == DeviceInfo(DeviceFlag.PCI | DeviceFlag.RESET, 9, 3)


def test_regions(client: Any) -> None:
    client.negotiate()

    def info(index: int) -> tuple[int, int]:
        found = client.ask(Command.DEVICE_GET_REGION_INFO, RegionInfo(index), RegionInfo)
        assert found.index == index
        return found.size, found.flags

    access = RegionFlag.READ | RegionFlag.WRITE
    assert info(RegionIndex.CONFIG) == (256, access)
    assert [info(index)[0] > 0 for index in range(6)] == [False, True, False, False, True, False]
    assert info(1)[1] == info(4)[1] == access
    assert info(RegionIndex.ROM) == info(RegionIndex.VGA) == (0, 0)


def test_interrupt_types(client: Any, log: Callable[[], list[str]]) -> None:
    client.negotiate()

    def info(index: int) -> tuple[int, int]:
        found = client.ask(Command.DEVICE_GET_IRQ_INFO, IrqInfo(index), IrqInfo)
        return found.count, found.flags

    flags = IrqFlag.EVENTFD | IrqFlag.MASKABLE | IrqFlag.AUTOMASKED
    assert info(IrqIndex.INTX) == (1, flags)
    assert info(IrqIndex.MSIX) == (5, IrqFlag.EVENTFD)
    assert info(IrqIndex.MSI)[0] == 0
    # To an error QEMU says nothing; that there are none of them, it would warn of.
    for index in (IrqIndex.ERR, IrqIndex.REQ):
        assert client.refused(Command.DEVICE_GET_IRQ_INFO, IrqInfo(index)) == errno.EINVAL
    assert log() == []


@pytest.mark.parametrize("vectors", [17, 65, 253])
def test_descriptors_of_all_vectors_in_one_message(
    device: Any, make_server: Any, new_client: Any, vectors: int
) -> None:
    """As Cloud Hypervisor's client sends them, whatever number of them it said it takes itself."""
    client = new_client(make_server(device, vectors=vectors))
    proposed = Capabilities(max_msg_fds=1, named=frozenset({"max_msg_fds"}))
    client.ask(Command.VERSION, Version(0, 1, proposed), Version)
    before = len(held().descriptors)
    fds = client.set_eventfd(IrqIndex.MSIX, 0, vectors)
    assert len(held().descriptors) == before + 2 * vectors
    told = IrqSet(IrqSetFlag.DATA_NONE | TRIGGER, IrqIndex.MSIX, 0, vectors)
    client.do(Command.DEVICE_SET_IRQS, told)
    assert [os.eventfd_read(fd) for fd in fds] == [1] * vectors
    client.map_memory()
    driver = client.driver()
    driver.accept(ANY_FEATURE)
    client.write(RegionIndex.CONFIG, driver.msix_capability + 2, 0x8000, 2)
    client.start_queue(driver, 0)
    driver.status |= Status.DRIVER_OK
    assert client.echo(driver, 0, b"vector 1")
    none = IrqSet(IrqSetFlag.DATA_NONE | TRIGGER, IrqIndex.MSIX, 0, 0)
    client.do(Command.DEVICE_SET_IRQS, none)


# --- registers


def test_configuration_space_in_one_read_and_in_pieces(client: Any) -> None:
    client.negotiate()
    whole = client.read(RegionIndex.CONFIG, 0, 256).to_bytes(256, "little")
    assert whole[:4] == bytes.fromhex("f41a6a10")  # virtio type 42
    for size in (1, 2, 4):
        parts = [client.read(RegionIndex.CONFIG, at, size) for at in range(0, 64, size)]
        assert b"".join(part.to_bytes(size, "little") for part in parts) == whole[:64]


def test_a_posted_write_is_done_and_never_answered(client: Any, device: Any) -> None:
    client.negotiate()
    driver = client.driver()
    driver.accept(ANY_FEATURE)
    client.post(NOTIFY_BAR, 20, Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | 128, 1)
    # The next answer is that of the next question.
    assert driver.status & Status.FAILED


def test_a_posted_write_that_is_refused_is_not_answered_either(
    client: Any, log: Callable[[], list[str]]
) -> None:
    client.negotiate()
    client.post(NOTIFY_BAR, 1 << 40, 1, 1)
    client.post(3, 0, 1, 1)
    assert client.read(RegionIndex.CONFIG, 0, 2) == 0x1AF4
    assert "1 bytes at 0x10000000000 of region 4" in log()[0]
    assert "region 3, which has 0" in log()[1]


def test_several_writes_in_one_message(client: Any, device: Any) -> None:
    client.negotiate()
    client.driver()
    writes = tuple(
        RegionWrite(offset, NOTIFY_BAR, len(data), data)
        for offset, data in ((20, b"\x01"), (22, b"\x02\0"), (24, struct.pack("<H", 16)))
    )
    done = client.ask(Command.REGION_WRITE_MULTI, WriteMulti(writes), WriteMultiDone)
    assert done.count == 3
    assert client.read(NOTIFY_BAR, 22, 2) == 2
    assert client.read(NOTIFY_BAR, 24, 2) == 16
    # As QEMU sends them.
    posted = (RegionWrite(22, NOTIFY_BAR, 2, b"\x01\0"),)
    client.send(Command.REGION_WRITE_MULTI, WriteMulti(posted), no_reply=True)
    assert client.read(NOTIFY_BAR, 22, 2) == 1


def test_many_requests_at_once_are_answered_in_order(client: Any) -> None:
    client.negotiate()
    asked = [
        request(Command.REGION_READ, number, RegionRead(0, RegionIndex.CONFIG, 4))
        for number in range(500)
    ]
    client.send_bytes(b"".join(asked))
    assert [client.receive().message_id for _ in range(500)] == list(range(500))


def test_a_client_that_does_not_read_its_answers_is_not_listened_to(
    client: Any, server: Any
) -> None:
    client.negotiate()
    one = request(Command.REGION_READ, 1, RegionRead(0, RegionIndex.CONFIG, 256))
    sent = 0
    listens = True
    while listens and sent < 64 << 20:
        server.settle()  # what it would read it has read
        before = sent
        client.sock.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                sent += client.sock.send(one * 100)
        client.sock.settimeout(5)
        listens = sent > before
    assert sent < 64 << 20
    whole, rest = divmod(sent, len(one))
    for _ in range(whole):
        assert len(client.receive().payload) == 16 + 256
    client.send_bytes(one[rest:])
    assert client.receive().message_id == 1


# --- rings


def test_a_chain_there_and_back(client: Any, device: Any) -> None:
    driver = client.boot(0, 1)
    assert client.echo(driver, 0, b"hello")
    assert client.echo(driver, 1, b"and again", slot=1)
    assert device.echoed == [b"hello", b"and again"]


def test_reset_stops_the_queues_and_keeps_memory_and_interrupts(client: Any, device: Any) -> None:
    driver = client.boot(0)
    assert client.echo(driver, 0, b"before")
    client.do(Command.DEVICE_RESET)
    assert not device.running
    assert client.read(RegionIndex.CONFIG, 4, 2) == 0
    driver = client.driver()
    driver.accept(ANY_FEATURE)
    client.write(RegionIndex.CONFIG, driver.msix_capability + 2, 0x8000, 2)
    client.start_queue(driver, 0)
    driver.status |= Status.DRIVER_OK
    assert client.echo(driver, 0, b"after")


def test_a_queue_is_notified_by_eventfd(client: Any, device: Any) -> None:
    driver = client.boot(0)
    needed = client.ask(Command.DEVICE_GET_REGION_IO_FDS, RegionIoFds(NOTIFY_BAR), RegionIoFds)
    assert needed.sub_regions == ()
    assert not client.received_fds
    asked = RegionIoFds(NOTIFY_BAR, argsz=needed.argsz)
    found = client.ask(Command.DEVICE_GET_REGION_IO_FDS, asked, RegionIoFds)
    assert [part.offset for part in found.sub_regions] == [NOTIFY + 4 * n for n in range(4)]
    assert [part.fd_index for part in found.sub_regions] == [0, 1, 2, 3]
    assert len(client.received_fds) == 4
    assert client.put(0, b"without a message")
    os.eventfd_write(client.received_fds[0], 1)
    client.wait_irq(1)
    assert client.echoed(b"without a message")
    assert driver.status & Status.DRIVER_OK


def test_no_more_eventfds_than_the_client_takes(client: Any) -> None:
    client.negotiate(Capabilities(max_msg_fds=2, named=frozenset({"max_msg_fds"})))
    found = client.ask(
        Command.DEVICE_GET_REGION_IO_FDS, RegionIoFds(NOTIFY_BAR, argsz=4096), RegionIoFds
    )
    assert len(found.sub_regions) == len(client.received_fds) == 2


def test_a_region_without_queues_has_no_eventfds(client: Any) -> None:
    client.negotiate()
    found = client.ask(Command.DEVICE_GET_REGION_IO_FDS, RegionIoFds(1, argsz=4096), RegionIoFds)
    assert found == RegionIoFds(1)


# --- memory


def test_maps_change_under_traffic(client: Any, device: Any) -> None:
    """As firmware does: taken apart and put together again, whole bursts of it posted at once."""
    driver = client.boot(0)
    flags = DmaFlag.READ | DmaFlag.WRITE
    half = MEMORY_SIZE // 2
    pieces = ((0, half), (half, half))
    for turn in range(8):
        assert client.put(0, b"in between %d" % turn, slot=turn)
        client.send(Command.DMA_UNMAP, DmaUnmap(0, MEMORY_SIZE))
        for at, size in pieces:
            client.send(Command.DMA_MAP, DmaMap(flags, at, at, size), (client.memfd,))
        for at, size in pieces:
            client.send(Command.DMA_UNMAP, DmaUnmap(at, size))
        last = client.send(Command.DMA_MAP, DmaMap(flags, 0, 0, MEMORY_SIZE), (client.memfd,))
        while True:
            message = client.receive()
            assert not message.failed
            if message.message_id == last:
                break
        driver.notify(0)
        client.wait_irq(1)
        client.drivers[0].get_used()
        assert client.echoed(b"in between %d" % turn, slot=turn)
    assert device.echoed == [b"in between %d" % turn for turn in range(8)]


def test_one_range_unmaps_all_that_lies_in_it(client: Any, device: Any) -> None:
    """As QEMU's vIOMMU and s390's zPCI do: ranges of a power of two, with gaps in them."""
    driver = client.boot(0)
    beyond = 1 << 32
    for at in (beyond, beyond + 0x3000, beyond + 0x7000):
        client.do(Command.DMA_MAP, DmaMap(3, 0, at, 4096), (client.memfd,))
    wide = DmaUnmap(beyond, 0x8000)
    assert client.ask(Command.DMA_UNMAP, wide, DmaUnmap) == wide
    assert client.refused(Command.DMA_UNMAP, wide) == errno.ENOENT
    for at in (beyond, beyond + 0x3000, beyond + 0x7000):
        client.do(Command.DMA_MAP, DmaMap(3, 0, at, 4096), (client.memfd,))
    assert device.running
    assert client.put(0, b"in between")
    driver.notify(0)
    client.wait_irq(1)
    assert client.echoed(b"in between")


def test_a_queue_runs_on_while_buffers_are_mapped(client: Any, device: Any) -> None:
    """Behind an IOMMU each buffer is mapped by itself, and the device sees none of that."""
    driver = client.boot(0)
    device.told.clear()
    beyond = 1 << 32
    for turn in range(40):
        at = beyond + (turn * 0x1000)
        client.do(Command.DMA_MAP, DmaMap(3, BUFFERS, at, 4096), (client.memfd,))
        assert client.put(0, b"mapped %d" % turn, at=at)
        driver.notify(0)
        client.wait_irq(1)
        client.drivers[0].get_used()
        assert client.echoed(b"mapped %d" % turn)
        client.ask(Command.DMA_UNMAP, DmaUnmap(at, 4096), DmaUnmap)
    assert device.told == []


def test_a_buffer_that_was_unmapped_while_a_chain_names_it(
    client: Any, device: Any, log: Callable[[], list[str]]
) -> None:
    """The guest takes away what it gave: the queue breaks, by name, and nothing else happens."""
    driver = client.boot(0)
    client.do(Command.DMA_MAP, DmaMap(3, BUFFERS, 1 << 32, 4096), (client.memfd,))
    client.put(0, b"gone", at=1 << 32)
    client.ask(Command.DMA_UNMAP, DmaUnmap(1 << 32, 4096), DmaUnmap)
    driver.notify(0)
    wait_until(lambda: driver.status & Status.DEVICE_NEEDS_RESET)
    assert any("0x100000000" in line for line in log())


def test_rings_wait_while_their_memory_is_away(client: Any, device: Any) -> None:
    driver = client.boot(0)
    assert client.put(0, b"patience")
    client.ask(Command.DMA_UNMAP, DmaUnmap(0, MEMORY_SIZE), DmaUnmap)
    assert not device.running
    driver.notify(0)
    client.map_memory()
    client.wait_irq(1)
    assert client.echoed(b"patience")


def test_unmapping_everything(client: Any, device: Any) -> None:
    client.boot(0)
    everything = DmaUnmap(0, 0, UnmapFlag.ALL)
    assert client.ask(Command.DMA_UNMAP, everything, DmaUnmap) == everything
    assert not device.running
    client.map_memory()
    client.ask(Command.DEVICE_GET_INFO, DeviceInfo(), DeviceInfo)  # so these were all maps
    assert device.running


def test_memory_that_the_device_may_only_read(client: Any) -> None:
    client.negotiate()
    read_only = os.open(f"/proc/self/fd/{client.memfd}", os.O_RDONLY)
    client.do(Command.DMA_MAP, DmaMap(DmaFlag.READ, 0, 0, MEMORY_SIZE), (read_only,))
    os.close(read_only)


def test_a_region_without_a_descriptor_is_taken(client: Any) -> None:
    client.negotiate()
    client.do(Command.DMA_MAP, DmaMap(DmaFlag.READ, 0, 0xFFFC0000, 0x40000))
    client.ask(Command.DMA_UNMAP, DmaUnmap(0xFFFC0000, 0x40000), DmaUnmap)


# --- interrupts


def test_a_vector_without_a_descriptor_stays_pending(client: Any) -> None:
    driver = client.boot(0)
    client.do(
        Command.DEVICE_SET_IRQS, IrqSet(IrqSetFlag.DATA_EVENTFD | TRIGGER, IrqIndex.MSIX, 1, 1)
    )
    assert client.put(0, b"quietly")
    driver.notify(0)
    pba = client.read(RegionIndex.CONFIG, driver.msix_capability + 8, 4)
    bar, offset = pba & 7, pba & ~7
    for _ in range(100):
        if client.read(bar, offset, 8) == 2:
            break
    assert client.read(bar, offset, 8) == 2
    client.set_eventfd(IrqIndex.MSIX, 1)
    client.wait_irq(1)
    assert client.read(bar, offset, 8) == 0


def test_all_vectors_disabled_at_once(client: Any) -> None:
    driver = client.boot(0)
    client.do(Command.DEVICE_SET_IRQS, IrqSet(IrqSetFlag.DATA_NONE | TRIGGER, IrqIndex.MSIX, 0, 0))
    assert client.put(0, b"quietly")
    driver.notify(0)
    assert driver.status & Status.DRIVER_OK
    assert client.irq_count(1) == 0


def test_the_client_triggers_an_interrupt_itself(client: Any) -> None:
    client.boot(0)
    client.do(Command.DEVICE_SET_IRQS, IrqSet(IrqSetFlag.DATA_NONE | TRIGGER, IrqIndex.MSIX, 0, 2))
    assert (client.irq_count(0), client.irq_count(1)) == (1, 1)
    some = IrqSet(IrqSetFlag.DATA_BOOL | TRIGGER, IrqIndex.MSIX, 0, 2, b"\0\1")
    client.do(Command.DEVICE_SET_IRQS, some)
    assert (client.irq_count(0), client.irq_count(1)) == (0, 1)


def intx(client: Any) -> Any:
    driver = client.boot(0, vectors=False)
    client.set_eventfd(IrqIndex.INTX, 0)
    return driver


def interrupted(client: Any, driver: Any) -> None:
    assert client.put(0, b"ring")
    driver.notify(0)
    client.wait_irq(0)
    client.drivers[0].get_used()


def test_intx_masks_itself_until_the_client_unmasks_it(client: Any) -> None:
    driver = intx(client)
    interrupted(client, driver)
    assert driver.take_events() == 1
    # Masked: asserted again, it is not told.
    assert client.put(0, b"ring")
    driver.notify(0)
    assert driver.status & Status.DRIVER_OK
    assert client.irq_count(0) == 0
    unmask = IrqSet(IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_UNMASK, IrqIndex.INTX, 0, 1)
    client.do(Command.DEVICE_SET_IRQS, unmask)
    client.wait_irq(0)
    assert driver.take_events() == 1
    client.do(Command.DEVICE_SET_IRQS, unmask)
    assert client.irq_count(0) == 0


def test_intx_is_unmasked_by_an_event(client: Any) -> None:
    driver = intx(client)
    event = os.eventfd(0, os.EFD_NONBLOCK)
    what = IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_UNMASK
    client.do(Command.DEVICE_SET_IRQS, IrqSet(what, IrqIndex.INTX, 0, 1), (event,))
    interrupted(client, driver)
    # Nobody acknowledged the interrupt: it is still asserted.
    os.eventfd_write(event, 1)
    client.wait_irq(0)
    client.do(Command.DEVICE_SET_IRQS, IrqSet(what, IrqIndex.INTX, 0, 1))
    os.eventfd_write(event, 1)
    os.close(event)
    assert driver.status & Status.DRIVER_OK
    assert client.irq_count(0) == 0


def test_a_semaphore_unmasks_intx_once(client: Any) -> None:
    """It stays readable for as long as the client likes."""
    driver = intx(client)
    event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
    what = IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_UNMASK
    client.do(Command.DEVICE_SET_IRQS, IrqSet(what, IrqIndex.INTX, 0, 1), (event,))
    interrupted(client, driver)
    for _ in range(2):
        os.eventfd_write(event, 1 << 40)
        client.wait_irq(0)
        for _ in range(20):
            assert driver.status & Status.DRIVER_OK  # messages, and turns of the server's loop
        assert client.irq_count(0) == 0
    os.close(event)


# --- clients come and go


def test_a_client_that_goes_in_the_middle_leaves_the_device_ready(
    server: Any, connect: Callable[[], Any], device: Any
) -> None:
    before = None
    for turn in range(3):
        client = connect()
        driver = client.boot(0, 1)
        assert client.echo(driver, 0, b"turn %d" % turn)
        # In the middle of a message, with a descriptor already there.
        half = request(Command.DMA_MAP, 7, DmaMap(3, 0, MEMORY_SIZE, 4096))[:30]
        client.send_bytes(half, (client.memfd,))
        server.settle()
        client.close()
        server.wait_for(*("connected", "gone") * (turn + 1))
        assert not device.running
        assert device.status == 0
        now = held().descriptors  # the clients keep their mappings
        before = before or now
        assert now == before


def test_the_next_client_waits_for_the_last_one(server: Any, connect: Callable[[], Any]) -> None:
    first, second = connect(), connect()
    first.negotiate()
    asked = second.send(Command.VERSION, Version(0, 0, None))
    server.settle()
    assert server.clients == ["connected"]
    first.close()
    assert second.answer(asked).decode_reply(Version) == Version()


def test_stopping_sends_the_client_away_and_removes_the_socket(
    server: Any, client: Any, device: Any
) -> None:
    client.boot(0)
    server.run(server.server.aclose())
    assert client.is_sent_away()
    assert not server.path.exists()
    assert device.on_config_change is None
    server.run(server.server.start())
    assert server.path.exists()


def test_reset_has_no_payload(client: Any) -> None:
    client.negotiate()
    client.do(Command.DEVICE_RESET, Empty())


def test_features_that_nobody_has_a_name_for_are_not_accepted(client: Any) -> None:
    client.negotiate()
    driver = client.driver()
    driver.accept(ANY_FEATURE)
    driver.status = Status(0)
    driver.status = Status.ACKNOWLEDGE | Status.DRIVER
    for word, bits in enumerate((0, 1 | 1 << 18)):
        driver.write_common(8, word, 4)
        driver.write_common(12, bits, 4)
    driver.status = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
    assert not driver.status & Status.FEATURES_OK


def test_a_queue_that_the_driver_resets_is_reset_in_the_device(client: Any, device: Any) -> None:
    """RING_RESET (virtio 1.3, 2.6.1): the device forgets what it kept of that queue."""
    driver = client.boot(0, 1)
    assert client.echo(driver, 0, b"text")
    driver.reset_queue(0)
    assert [what for what in device.told if what[0] == "reset queue"] == [("reset queue", 0)]
    assert client.echo(driver, 1, b"goes on")
