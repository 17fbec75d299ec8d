"""A dirty log outlives the process that marks in it."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

from tests.support.keeper import kept, socket_ports
from vring import LOG_PAGE
from vring_serial.guest.frontend import Frontend
from vring_serial.guest.memory import GuestRam
from vring_serial.proto.vhost_user import U64, LogArea, ProtocolFeature, Request


async def test_a_successor_marks_all_memory_in_a_log_whose_last_marks_may_be_missing(
    tmp_path: Path,
) -> None:
    ram = GuestRam(1 << 20)
    first = ram.guest_addr // LOG_PAGE // 8
    size = first + ram.size // LOG_PAGE // 8
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    try:
        async with kept(tmp_path, *socket_ports([1])) as keeper:
            frontend = Frontend(str(keeper.path))
            with closing(frontend):
                await frontend.connect()
                await frontend.negotiate_protocol()
                features = frontend.protocol_features | ProtocolFeature.LOG_SHMFD
                await frontend.tell(Request.SET_PROTOCOL_FEATURES, U64(features))
                await frontend.set_memory(ram)
                await frontend.tell(Request.SET_LOG_BASE, LogArea(size), (fd,))
                assert not any(os.pread(fd, size, 0))
                await keeper.kill()
                await frontend.ask(Request.GET_FEATURES, U64)
                assert os.pread(fd, size, 0) == bytes(first) + b"\xff" * (size - first)
    finally:
        ram.close()
        os.close(fd)
