"""Monitors of single VMs, and what all monitors are told of VMs that come and go."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.commands import run_vring
from tests.support.keeper import SERVING, kept
from tests.support.qmp import qmp_client, refused
from tests.support.waiting import until
from vring_serial import EmbeddedGuest

OF_ALL = 'qmp = "unix:qmp,server=on,wait=off"\n'
VM = """\
[vm.{name}]
vhost-user = "{name}"
qmp = "unix:{name}-qmp,server=on,wait=off"
[vm.{name}.chardev.c]
backend = "socket"
path = "{name}-c"
server = true
wait = false
[[vm.{name}.port]]
chardev = "c"
name = "org.example.data"
"""
#: A VM as `x-vring-vm-add` takes it.
LATE = {
    "vhost-user": "late",
    "chardev": {"c": {"backend": "null"}},
    "port": [{"chardev": "c", "name": "org.example.data"}],
}


@pytest.fixture(autouse=True)
def short_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VRING_QMP", raising=False)


@asynccontextmanager
async def service(tmp_path, *, of_all=OF_ALL):
    Path("two.toml").write_text(of_all + VM.format(name="a") + VM.format(name="b"))
    async with kept(tmp_path, protocol="config", socket="two.toml") as keeper:
        await keeper.logged(SERVING, 2)
        await keeper.logged("QMP of b at unix:b-qmp")
        yield keeper


def process_of(keeper, name):
    """The worker of a VM."""
    (pid,) = [
        p for p in keeper.children if Path(f"/proc/{p}/comm").read_text() == f"vring {name}\n"
    ]
    return pid


async def told(client, name):
    """The data of the next event of this name."""
    while (event := await client.events.get())["event"] != name:
        pass
    return event["data"]


async def test_it_sees_its_vm_alone_and_puts_no_name_before_names(tmp_path):
    async with (
        service(tmp_path, of_all=""),
        qmp_client("a-qmp") as a,
        qmp_client("b-qmp") as b,
        EmbeddedGuest("b", memory=32 << 20) as guest,
    ):
        assert await a.execute("query-name") == {"name": "a"}
        (vm,) = await a.execute("x-vring-status")
        assert (vm["name"], vm["prefix"]) == ("a", "")
        assert [c["label"] for c in await a.execute("query-chardev")] == ["c"]
        assert (await a.execute("query-status"))["running"] is False
        assert (await b.execute("query-status"))["running"] is True
        (device,) = await a.execute("x-query-virtio")
        assert device["path"] == "/machine/peripheral/virtio-serial0/virtio-backend"
        # What it changes, it changes there.
        await b.execute("chardev-add", {"id": "n", "backend": {"type": "null", "data": {}}})
        new = {"driver": "virtserialport", "chardev": "n", "id": "p", "name": "org.example.new"}
        await b.execute("device_add", new)
        port = await guest.wait_port(name="org.example.new")
        await port.wait_host()
        _, writer = await port.open()
        assert await told(b, "VSERPORT_CHANGE") == {"id": "p", "open": True}
        writer.close()
        # And nothing of others, by whatever name.
        assert (await refused(a, "device_del", id="p"))[0] == "DeviceNotFound"
        for name in ("b/n", "b/p", "a/c"):
            assert (await refused(a, "chardev-remove", id=name))[1] == f"Chardev '{name}' not found"
        assert (await refused(a, "x-vring-restart", vm="b")) == (
            "DeviceNotFound",
            "VM 'b' not found",
        )
        before = await b.execute("x-vring-status")
        await a.execute("x-vring-restart")
        assert await told(a, "X_VRING_WORKER") == {"vm": "a", "restarts": 1, "reason": "replaced"}
        assert await b.execute("x-vring-status") == before
        assert a.events.empty()
        status, out, err = await run_vring("ctl", "--qmp", "a-qmp", "--json", "ports")
        assert (status, err, len(json.loads(out))) == (0, "", 1)


async def test_vms_are_the_services_monitors_business(tmp_path):
    async with service(tmp_path), qmp_client("a-qmp") as a, qmp_client("qmp") as every:
        whole, own = [
            {command["name"] for command in await client.execute("query-commands")}
            for client in (every, a)
        ]
        assert whole - own == {"x-vring-vm-add", "x-vring-vm-remove"}
        assert own < whole
        assert (await refused(a, "x-vring-vm-add", name="late", config=LATE)) == (
            "CommandNotFound",
            "The command x-vring-vm-add has not been found",
        )
        of_all, of_one = [
            {e["name"] for e in await client.execute("query-qmp-schema") if "arg-type" in e}
            for client in (every, a)
        ]
        assert of_all - of_one == {"x-vring-vm-add", "x-vring-vm-remove", "X_VRING_VM"}


async def test_all_are_told_of_vms_that_come_and_go(tmp_path):
    async with service(tmp_path) as keeper, qmp_client("qmp") as every:
        for _ in range(2):
            await every.execute("x-vring-vm-add", {"name": "late", "config": LATE})
            assert await told(every, "X_VRING_VM") == {"vm": "late", "state": "added"}
            await every.execute("x-vring-vm-remove", {"name": "late"})
            assert await told(every, "X_VRING_VM") == {"vm": "late", "state": "removed"}
        # A VM's monitor goes with it, and is told; others stay.
        async with qmp_client("a-qmp") as a, qmp_client("b-qmp") as b:
            await every.execute("x-vring-vm-remove", {"name": "a"})
            assert await told(every, "X_VRING_VM") == {"vm": "a", "state": "removed"}
            assert await told(a, "SHUTDOWN") == {"guest": False, "reason": "host-qmp-quit"}
            await until(lambda: not {"a", "a-qmp", "a-c"} & set(os.listdir()))
            assert (await b.execute("query-name")) == {"name": "b"}
            assert b.events.empty()
        # Another process of the monitor goes on with what there is.
        victim = keeper.monitor
        os.kill(victim, signal.SIGKILL)
        await until(lambda: victim not in keeper.children and len(keeper.children) == 2)
        async with asyncio.timeout(30), qmp_client("b-qmp") as b:
            assert [vm["name"] for vm in await b.execute("x-vring-status")] == ["b"]
        assert "a-qmp" not in os.listdir()
        assert await keeper.stop() == 0
    assert sorted(os.listdir()) == ["log", "two.toml"]


async def test_vms_that_are_added_have_monitors_of_their_own(tmp_path):
    own = LATE | {"qmp": "unix:late-qmp,server=on,wait=off"}
    async with service(tmp_path) as keeper, qmp_client("qmp") as every:
        for turn in range(2):
            await every.execute("x-vring-vm-add", {"name": "late", "config": own})
            async with qmp_client("late-qmp") as late:
                assert await late.execute("query-name") == {"name": "late"}
                (vm,) = await late.execute("x-vring-status")
                assert (vm["name"], vm["prefix"]) == ("late", "")
                # The VM's worker dies, and then the monitor's process: others go on.
                served = keeper.log.count(SERVING)
                os.kill(process_of(keeper, "late"), signal.SIGKILL)
                await keeper.logged(SERVING, served + 1)
                assert (await told(late, "X_VRING_WORKER"))["reason"] == "died"
            if turn:
                victim = keeper.monitor
                os.kill(victim, signal.SIGKILL)
                await until(lambda victim=victim: victim not in keeper.children)
                await until(lambda: len(keeper.children) == 4)
            async with (
                asyncio.timeout(30),
                qmp_client("late-qmp") as late,
                qmp_client("qmp") as again,
            ):
                assert await late.execute("query-name") == {"name": "late"}
                await again.execute("x-vring-vm-remove", {"name": "late"})
                assert await told(late, "SHUTDOWN") == {"guest": False, "reason": "host-qmp-quit"}
            await until(lambda: not {"late", "late-qmp"} & set(os.listdir()))
        async with qmp_client("qmp") as again:
            for address, why in (
                ("unix:late-qmp", "vm.late.qmp unix:late-qmp: needs server=on"),
                (
                    "unix:b-qmp,server=on",
                    "vm-add: vm.late.qmp: b-qmp: exists, another process listens on it",
                ),
            ):
                config = LATE | {"qmp": address}
                text = (await refused(again, "x-vring-vm-add", name="late", config=config))[1]
                assert why in text, text
            assert "late" not in [vm["name"] for vm in await again.execute("x-vring-status")]
        async with qmp_client("b-qmp") as b:
            assert await b.execute("query-name") == {"name": "b"}
        assert await keeper.stop() == 0
    assert sorted(os.listdir()) == ["log", "two.toml"]


async def test_bad_addresses_are_named_with_their_place(tmp_path):
    bad = VM.format(name="a").replace(",server=on", "")
    Path("bad.toml").write_text(bad)
    assert await run_vring("config", "check", "bad.toml") == (
        2,
        "",
        "vring: bad.toml:3: vm.a.qmp unix:a-qmp,wait=off: needs server=on: a monitor listens\n",
    )
    Path("bad.toml").write_text('qmp = ["unix:x,server=on",\n  "tcp:10.0.0.1:1,server=on"]\n' + bad)
    status, _, err = await run_vring("config", "check", "bad.toml")
    assert (status, err.partition(": 10.0")[0]) == (2, "vring: bad.toml:2: qmp[2]")
    Path("good.toml").write_text(VM.format(name="a"))
    async with await asyncio.start_unix_server(lambda reader, writer: writer.close(), "a-qmp"):
        status, _, err = await run_vring("serve", "--config", "good.toml")
        why = "good.toml:3: vm.a.qmp: a-qmp: exists, another process listens on it\n"
        assert (status, f"vring: {why}" in err) == (1, True)
    status, _, err = await run_vring("serve", "--no-keeper", "--config", "good.toml")
    assert (status, "--qmp needs the keeper" in err) == (2, True)
    status, out, _ = await run_vring("config", "show", "--config", "good.toml")
    assert 'qmp = ["unix:a-qmp,server=on,wait=off"]' in out
    Path("shown.toml").write_text(out)
    assert (await run_vring("config", "show", "--config", "shown.toml"))[1] == out
