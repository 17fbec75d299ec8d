"""VMs that are added to a running service, and removed from it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.service.test_upgrade import upgrade, versions
from tests.support.keeper import SERVING, kept, socket_ports
from tests.support.qmp import qmp_client, refused
from tests.support.streams import all_go_on, flowing
from tests.support.waiting import until
from vring_serial import EmbeddedGuest
from vring_serial.config.toml_file import vm_from_text, vm_text
from vring_serial.errors import ConfigError
from vring_serial.guest.errors import BackendClosedError
from vring_serial.service.roster import TEXT_MAX

__all__ = ["versions"]

QMP = ("--qmp", "unix:qmp,server=on,wait=off")


@pytest.fixture(autouse=True)
def short_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def vm(nr, socket="w", **more):
    """The table of a VM with one port."""
    chardev = {"backend": "socket", "path": f"c{nr}", "server": True, "wait": False}
    port = {"chardev": "c", "name": f"org.example.data{nr}"}
    return {"vhost-user": socket, "chardev": {"c": chardev}, "port": [port], **more}


@asynccontextmanager
async def service(tmp_path, *arguments, **options):
    async with kept(tmp_path, *socket_ports([1]), *QMP, *arguments, **options) as keeper:
        await keeper.logged("QMP at unix:qmp")
        async with qmp_client() as client:
            yield keeper, client


async def add(client, name, table):
    await client.execute("x-vring-vm-add", {"name": name, "config": table})


async def remove(client, name):
    await client.execute("x-vring-vm-remove", {"name": name})


async def names(client):
    return [vm["name"] for vm in await client.execute("x-vring-status")]


def held(keeper):
    """What keeper and worker have open; None while that changes."""
    with suppress(FileNotFoundError):
        return keeper.held


def process_of(keeper, name):
    """The worker of a VM."""
    (pid,) = [
        p for p in keeper.children if Path(f"/proc/{p}/comm").read_text() == f"vring {name}\n"
    ]
    return pid


async def test_a_vm_comes_and_goes_beside_another(tmp_path):
    metrics = ("--metrics", "unix:metrics")
    async with service(tmp_path, *metrics) as (keeper, client):
        await keeper.logged("metrics at")
        before = keeper.held
        files = sorted(os.listdir())
        async with (
            EmbeddedGuest("v", memory=32 << 20) as first,
            flowing(keeper, first, [1], random.Random(1)) as streams,
        ):
            await add(client, "late", vm(2))
            assert await names(client) == ["vring", "late"]
            # The first one's names stay as they were.
            labels = [c["label"] for c in await client.execute("query-chardev")]
            assert labels == ["c1", "late/c"]
            async with EmbeddedGuest("w", memory=32 << 20) as second:
                async with flowing(keeper, second, [2], random.Random(2)) as others:
                    await all_go_on([*streams, *others])
                    await keeper.kill_of(process_of(keeper, "late"))
                    await all_go_on([*streams, *others])
                    await client.execute("x-vring-restart", {"vm": "late"})
                    port = {"driver": "virtserialport", "bus": "late/virtio-serial0.0"}
                    await client.execute("device_add", port)
                    await all_go_on([*streams, *others])
                    assert b'vring_worker_restarts_total{vm="late"} 2.0' in await scrape()
                    os.kill(keeper.monitor, signal.SIGKILL)
                    await keeper.logged("QMP at unix:qmp", 2)
                    await all_go_on([*streams, *others])
                async with qmp_client() as again:
                    assert await names(again) == ["vring", "late"]
                    reader, writer = await asyncio.open_unix_connection("c2")
                    port = await second.wait_port(nr=2)
                    await port.wait_host()
                    inside, _ = await port.open()
                    await remove(again, "late")
                    assert await reader.read() == b""
                    with pytest.raises(BackendClosedError):
                        await inside.read()
                    writer.close()
                    assert await names(again) == ["vring"]
                    assert b"late" not in await scrape()
                    assert not os.path.exists("w")
                    assert not os.path.exists("c2")
                    await all_go_on(streams)
                    # The same again: nothing is left of it.
                    await add(again, "late", vm(2))
                    await remove(again, "late")
        await until(lambda: held(keeper) == before, lambda: (before, held(keeper)))
        assert sorted(os.listdir()) == files
        assert await keeper.stop() == 0


async def scrape():
    reader, writer = await asyncio.open_unix_connection("metrics")
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    text = await reader.read()
    writer.close()
    return text


async def test_what_cannot_be_added_is_told_and_leaves_nothing(tmp_path):
    async with service(tmp_path) as (keeper, client):
        before = keeper.held
        children = keeper.children
        with socket.socket(socket.AF_UNIX) as other:
            other.bind("taken")
            other.listen()
            for name, table, why in (
                ("vring", vm(2), "there is a VM vring already"),
                ("a b", vm(2), "that is no name of a VM"),
                ("monitor", vm(2), "there is a VM monitor already"),
                ("x", {}, "needs vhost-user or vfio-user"),
                ("x", vm(2, shoes=1), "vm.x.shoes: there is no such key"),
                ("x", vm(1), "c1 is in use already"),
                ("x", vm(2, socket="v"), "the path is in use already"),
                ("x", vm(2, socket="taken"), "taken"),
                ("x", vm(2, socket="no/where"), "there is no directory no"),
                ("x", vm(2, user="nobody-of-that-name"), "nobody-of-that-name"),
                ("x", vm(2, domain="/etc/passwd"), "no file is read while the service runs"),
                (
                    "x",
                    vm(2) | {"chardev": {"c": {"backend": "stdio"}}},
                    "the service's own process",
                ),
                ("x", vm(2, sandbox="x" * TEXT_MAX), f"{TEXT_MAX} are allowed"),
            ):
                error, text = await refused(client, "x-vring-vm-add", name=name, config=table)
                assert error == "GenericError"
                assert why in text, text
        assert (await refused(client, "x-vring-vm-add", name="x"))[
            1
        ] == "Parameter 'config' is missing"
        assert await refused(client, "x-vring-vm-remove", name="x") == (
            "DeviceNotFound",
            "VM 'x' not found",
        )
        assert "is the only VM" in (await refused(client, "x-vring-vm-remove", name="vring"))[1]
        assert await names(client) == ["vring"]
        assert keeper.children == children
        await until(lambda: held(keeper) == before, lambda: (before, held(keeper)))
        await add(client, "x", vm(2))
        assert await names(client) == ["vring", "x"]


async def test_a_configured_vm_goes_and_upgrades_know_of_all(tmp_path, versions):
    Path("vring.toml").write_text(
        'qmp = ["unix:qmp,server=on,wait=off"]\n'
        + "".join(
            f'[vm.{name}]\nvhost-user = ["{name}"]\n[vm.{name}.chardev.c]\nbackend = "null"\n'
            f'[[vm.{name}.port]]\nchardev = "c"\nname = "org.example.n"\n'
            for name in ("a", "b")
        )
    )
    options = {"protocol": "config", "socket": "vring.toml", "environment": versions.environment}
    async with kept(tmp_path, **options) as keeper:
        await keeper.logged(SERVING, 2)
        await keeper.logged("QMP at unix:qmp")
        async with qmp_client() as client:
            await add(client, "late", vm(2, qmp="unix:own,server=on,wait=off"))
            await remove(client, "a")
            assert await names(client) == ["b", "late"]
            assert not os.path.exists("a")
        async with (
            EmbeddedGuest("w", memory=32 << 20) as guest,
            flowing(keeper, guest, [2], random.Random(2)) as streams,
        ):
            for new in ("2", "1"):
                versions.install(new)
                status, text = await upgrade(str(keeper.process.pid))
                assert status == 0, text
                assert "with 3 of its workers" in text
                await all_go_on(streams)
                async with qmp_client() as client, qmp_client("own") as own:
                    assert await names(client) == ["b", "late"]
                    assert await names(own) == ["late"]
        async with qmp_client() as client:
            await add(client, "a", vm(3, socket="a"))
            await remove(client, "late")
            assert await names(client) == ["b", "a"]
        assert await keeper.stop() == 0
    assert sorted(p for p in os.listdir() if len(p) < 4) == ["log"]


def test_a_description_is_one_line_of_ascii():
    table = vm(1) | {"chardev": {"c": {"backend": "file", "path": "ü\n\x85\u2028=x"}}}
    text = vm_text("x", table)
    assert text.isascii()
    assert len(text.splitlines()) == 1
    (controller,) = vm_from_text(text).topology.controllers
    assert controller.ports[0].chardev.options.path == "ü\n\x85\u2028=x"
    assert json.loads(text) == {"x": table}
    with pytest.raises(ConfigError, match="no description of a VM"):
        vm_text("x", {"a": float("nan")})
