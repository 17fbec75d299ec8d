"""`x-vring-restart`: a fresh worker goes on, and whoever talks to the device notices a pause."""

from __future__ import annotations

import os
import random
import re
import signal
from contextlib import asynccontextmanager

import pytest
from qemu.qmp.qmp_client import ExecuteError

from tests.support.keeper import SERVING, kept, socket_ports
from tests.support.qmp import qmp_client
from tests.support.streams import all_go_on, flowing
from tests.support.vfio_guest import VfioGuest
from vring_serial import EmbeddedGuest
from vring_serial.service.link import Answerer, CallTimeoutError, make_link
from vring_serial.service.qmp.vm import Vm
from vring_serial.service.worker import LIVES_MAX, Worker, WorkerSpec

RESTARTS = int(os.environ.get("VRING_RESTARTS", "5"))
PORTS = range(1, 5)
QMP = ("--qmp", "unix:qmp,server=on,wait=off")


@pytest.fixture(autouse=True)
def short_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@asynccontextmanager
async def monitor(keeper):
    await keeper.logged("QMP at unix:qmp")
    async with qmp_client() as client:
        yield client


async def next_worker_event(client):
    while True:
        event = await client.events.get()
        if event["event"] == "X_VRING_WORKER":
            return event["data"]


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("protocol", ["vhost-user", "vfio-user"])
async def test_under_traffic_no_byte_is_lost(tmp_path, protocol, packed):
    if protocol == "vhost-user":
        guest = EmbeddedGuest("v", memory=64 << 20, packed=packed)
    else:
        guest = VfioGuest("v", len(PORTS), packed=packed)
    arguments = [*socket_ports(PORTS), *QMP, *(["--packed"] if packed else [])]
    async with (
        kept(tmp_path, *arguments, protocol=protocol) as keeper,
        monitor(keeper) as client,
        guest,
        flowing(keeper, guest, PORTS, random.Random(RESTARTS)) as streams,
    ):
        for number in range(1, RESTARTS + 1):
            worker = keeper.worker
            await client.execute("x-vring-restart")
            assert keeper.worker != worker
            assert await next_worker_event(client) == {
                "vm": "vring",
                "restarts": number,
                "reason": "replaced",
            }
            (vm,) = await client.execute("x-vring-status")
            assert vm["restarts"] == number
            assert vm["controllers"][0]["frontend"]
            await all_go_on(streams)
            if number == 1:
                held = keeper.held
        assert keeper.held == held
        await keeper.kill()
        assert (await next_worker_event(client))["reason"] == "died"
        await all_go_on(streams)
    log = keeper.log
    assert log.count("another process goes on from here") == RESTARTS
    assert log.count(f"{'frontend' if protocol == 'vhost-user' else 'client'} connected") == 1
    assert log.count("opened by the guest") == len(PORTS)


def two_vms(workers):
    return f'qmp = ["{QMP[1]}"]\nworkers = "{workers}"\n' + "".join(
        f'[vm.{name}]\nvhost-user = ["{name}"]\n[vm.{name}.chardev.c]\nbackend = "null"\n'
        f'[[vm.{name}.port]]\nchardev = "c"\nname = "org.example.data"\n'
        for name in ("a", "b")
    )


async def restarts(client):
    return {vm["name"]: vm["restarts"] for vm in await client.execute("x-vring-status")}


async def test_one_vm_of_several_or_all_of_them(tmp_path):
    (tmp_path / "vring.toml").write_text(two_vms("vm"))
    async with kept(tmp_path, protocol="config", socket="vring.toml") as keeper:
        await keeper.logged(SERVING, 2)
        async with monitor(keeper) as client:
            await client.execute("x-vring-restart", {"vm": "b"})
            assert await restarts(client) == {"a": 0, "b": 1}
            await client.execute("x-vring-restart")
            assert await restarts(client) == {"a": 1, "b": 2}
            with pytest.raises(ExecuteError) as caught:
                await client.execute("x-vring-restart", {"vm": "c"})
            assert caught.value.error_class == "DeviceNotFound"
            assert str(caught.value) == "VM 'c' not found"


async def test_vms_of_one_worker_are_replaced_together(tmp_path):
    (tmp_path / "vring.toml").write_text(two_vms("shared"))
    async with (
        kept(tmp_path, protocol="config", socket="vring.toml") as keeper,
        monitor(keeper) as client,
    ):
        await client.execute("x-vring-restart", {"vm": "a"})
        assert await restarts(client) == {"a": 1, "b": 1}


async def test_one_that_does_not_hand_over_is_told_of(monkeypatch):
    monkeypatch.setattr("vring_serial.service.qmp.vm.ANSWER_SECONDS", 0.1)
    mine, its = make_link()
    told = []
    with (
        Vm("a", mine, lambda *event: told.append(event)) as vm,
        Answerer(its, {"restart": lambda: 1}, "the monitor") as answerer,
    ):
        answerer.tell("worker", {"restarts": 1, "reason": "died"})  # that is this one
        with pytest.raises(CallTimeoutError, match=re.escape("no other worker of a serves")):
            await vm.restart()
        answerer.tell("worker", {"restarts": 2, "reason": "replaced"})
        await vm.restart()
    assert [data["restarts"] for _, _, data in told] == [1, 2]


def test_a_worker_that_asks_again_and_again_is_not_heard(monkeypatch):
    """It may be a guest's by now."""
    sent = []
    monkeypatch.setattr(Worker, "signal", lambda _, number: sent.append(number))
    worker = Worker(WorkerSpec("w", lambda _: 0), -1, None, None, None, pid=1)
    worker.ask_for_successor()
    assert not sent  # it does not serve yet
    for _ in range(2 * LIVES_MAX):
        worker.ready = True
        worker.ask_for_successor()
        worker.ask_for_successor()
        worker.begin_again()
    assert sent == [signal.SIGUSR2] * LIVES_MAX
