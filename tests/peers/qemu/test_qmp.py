"""Our monitor beside stock QEMU's: the same requests, the same replies."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

from tests.support.keeper import kept, socket_ports
from tests.support.processes import running
from tests.support.qemu_machine import QEMU
from tests.support.waiting import until


def add(kind, id, **data):
    """A request for a new chardev."""
    arguments = {"id": id, "backend": {"type": kind, "data": data}}
    return json.dumps({"execute": "chardev-add", "arguments": arguments})


def change(id):
    """A request for another end of a chardev."""
    arguments = {"id": id, "backend": {"type": "null", "data": {}}}
    return json.dumps({"execute": "chardev-change", "arguments": arguments})


def device(driver="virtserialport", **properties):
    """A request for a new port."""
    return json.dumps({"execute": "device_add", "arguments": {"driver": driver, **properties}})


#: Requests whose replies are the same to the letter.
SAME = [
    '{"execute":"query-status"}',
    "[1]",
    "42 ",
    '{"a":1}',
    '{"execute":1}',
    '{"execute":"qmp_capabilities","arguments":[]}',
    '{"execute":"x","foo":1,"id":3}',
    "{}",
    '{"execute":"qmp_capabilities","id":[1,{"a":2}]}',
    '{"execute":"qmp_capabilities"}',
    '{"execute":"nonsense","id":"x"}',
    '{"execute":"query-status","arguments":{"x":1}}',
    '{"execute":"query-name"}',
    '{"execute":"query-chardev"}',
    '{"execute":"chardev-send-break","arguments":{"id":"c1"}}',
    '{"execute":"chardev-send-break","arguments":{"id":"nope"}}',
    '{"execute":"ringbuf-write","arguments":{"device":"r0","data":"hello"}}',
    '{"execute":"ringbuf-read","arguments":{"device":"r0","size":2}}',
    '{"execute":"ringbuf-read","arguments":{"device":"r0","size":100,"format":"base64"}}',
    '{"execute":"ringbuf-read","arguments":{"device":"r0","size":0}}',
    '{"execute":"ringbuf-read","arguments":{"device":"r0","size":"1"}}',
    '{"execute":"ringbuf-read","arguments":{"device":"r0"}}',
    '{"execute":"ringbuf-read","arguments":{"device":"c1","size":10}}',
    '{"execute":"ringbuf-read","arguments":{"device":"nope","size":10}}',
    '{"execute":"ringbuf-write","arguments":{"device":"r0","data":"a","format":"bad"}}',
    add("null", "z"),
    add("null", "z"),
    add("ringbuf", "zs", size=1024),
    add("foo", "zr"),
    add("null", "zl", logfile="log"),
    add("null", "zm", logfile=5),
    '{"execute":"chardev-remove","arguments":{"id":"zl"}}',
    '{"execute":"chardev-add","arguments":{"id":"zr"}}',
    '{"execute":"chardev-add","arguments":{"id":5,"backend":{"type":"null","data":{}}}}',
    '{"execute":"chardev-remove","arguments":{"id":"nope"}}',
    '{"execute":"chardev-remove","arguments":{"id":"c1"}}',
    '{"execute":"chardev-change","arguments":{"id":"nope","backend":{"type":"null","data":{}}}}',
    device(bus="virtio-serial0.0", chardev="z", id="p0", name="org.p"),
    '{"execute":"query-chardev"}',
    device(bus="virtio-serial0.0", chardev="z", id="p1", name="org.q"),
    device(bus="virtio-serial0.0", chardev="zs", id="p1", name="org.p"),
    device(bus="virtio-serial0.0", chardev="zs", id="p1", nr=1),
    device(bus="virtio-serial0.0", chardev="zs", id="p1", nr=99),
    device(bus="virtio-serial0.0", chardev="nope", id="p1"),
    device(bus="nobus", chardev="zs", id="p1"),
    device(chardev="zs", id="p0"),
    device(chardev="zs", id="p1", foo=1),
    device("nodriver"),
    '{"execute":"device_add","arguments":{"id":"x"}}',
    '{"execute":"chardev-remove","arguments":{"id":"z"}}',
    '{"execute":"device_del","arguments":{"id":"p0"}}',
    '{"execute":"device_del","arguments":{"id":"p0"}}',
    '{"execute":"chardev-remove","arguments":{"id":"z"}}',
    '{"execute":"query-chardev"}',
    add("null", "m"),
    add("null", "m-base"),
    '{"execute":"chardev-send-break","arguments":{"id":"m"}}',
    '{"execute":"chardev-send-break","arguments":{"id":"m-base"}}',
    '{"execute":"chardev-remove","arguments":{"id":"m"}}',
    '{"execute":"chardev-remove","arguments":{"id":"m-base"}}',
    change("m"),
    change("m-base"),
    device(bus="virtio-serial0.0", chardev="m", id="m4", nr=14),
    device(bus="virtio-serial0.0", chardev="m", id="m5", nr=15),
    device(bus="virtio-serial0.0", chardev="m", id="m6", nr=16),
    '{"execute":"device_del","arguments":{"id":"m4"}}',
    device(bus="virtio-serial0.0", chardev="m", id="m6", nr=16),
    '{"execute":"device_del","arguments":{"id":"m6"}}',
    '{"execute":"device_del","arguments":{"id":"m5"}}',
    '{"execute":"query-chardev"}',
    '{"execute":"device-list-properties","arguments":{"typename":"virtserialport"}}',
    '{"execute":"device-list-properties","arguments":{"typename":"nope"}}',
    '{"execute":"x-query-virtio"}',
    '{"execute":"x-query-virtio-status","arguments":{"path":"/nope"}}',
    '{"execute":"x-query-virtio-queue-status","arguments":'
    '{"path":"/machine/peripheral/virtio-serial0/virtio-backend","queue":2000}}',
]
#: Whose replies have the same class of error, or error at all, and say in words of their own why.
ALIKE = ["foo ", '{"execute": }', "}", add("null", "zm", logfile="no/such/log")]
#: What may be said of every chardev here alone.
OURS = ("logsize", "logbackups")


class Talk:
    """A connection to a monitor: one reply for each request, events aside.

    Attributes:
        events: name and data of those that came.
    """

    def __init__(self, reader, writer):
        self.events = []
        self._reader = reader
        self._writer = writer

    async def reply(self, request=None):
        if request is not None:
            self._writer.write(request.encode() + b"\n")
        while True:
            line = await self._reader.readline()
            assert line.endswith(b"\r\n")
            value = json.loads(line)
            if "event" not in value:
                return value
            self.events.append((value["event"], value["data"]))

    async def told(self, name):
        """What came with an event of this name, once it has come."""
        while not (found := [data for event, data in self.events if event == name]):
            value = json.loads(await self._reader.readline())
            self.events.append((value["event"], value["data"]))
        return found


@asynccontextmanager
async def talk(path):
    reader, writer = await asyncio.open_unix_connection(path, limit=1 << 20)
    try:
        yield Talk(reader, writer)
    finally:
        writer.close()
        await writer.wait_closed()


@asynccontextmanager
async def both(tmp_path):
    """Stock QEMU and our service, with the same ports."""
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    devices = [
        *("-device", "virtio-serial-pci,id=virtio-serial0"),
        *("-chardev", "socket,id=c1,path=c1,server=on,wait=off"),
        *("-device", "virtserialport,bus=virtio-serial0.0,chardev=c1,name=org.example.data1,nr=1"),
        *("-chardev", "ringbuf,id=r0,size=4096"),
        *("-device", "virtconsole,bus=virtio-serial0.0,chardev=r0,nr=0"),
        *("-chardev", "socket,id=m,path=m,server=on,wait=off,mux=on"),
        *("-device", "virtserialport,bus=virtio-serial0.0,chardev=m,nr=12"),
        *("-device", "virtserialport,bus=virtio-serial0.0,chardev=m,nr=13"),
    ]
    monitor = "unix:qmp,server=on,wait=off"
    console = ("--chardev", "ringbuf,id=r0,size=4096", "--console", "chardev=r0")
    shared = ("--chardev", "socket,id=m,path=m,server=on,wait=off,mux=on")
    shared += ("--port", "chardev=m,nr=12", "--port", "chardev=m,nr=13")
    ports = (*socket_ports([1]), *console, *shared)
    async with (
        running(
            *QEMU, "-machine", "q35", "-S", "-name", "vring", *devices, "-qmp", monitor, cwd=theirs
        ),
        kept(ours, *ports, "--qmp", monitor, "--reach", str(ours)) as keeper,
    ):
        await keeper.logged("QMP at")
        await until(lambda: (theirs / "qmp").exists())
        async with talk(theirs / "qmp") as qemu, talk(ours / "qmp") as vring:
            yield qemu, vring


def comparable(reply):
    """A reply without what differs between two machines in the same state."""
    if isinstance(reply.get("return"), list):
        entries = [
            entry
            for entry in reply["return"]
            if entry.get("label") != "compat_monitor0"  # QEMU's own connection
        ]
        for entry in entries:
            entry.pop("frontend-open", None)  # QEMU calls a ring buffer open, whatever the guest
        return {
            **reply,
            "return": sorted(entries, key=lambda entry: json.dumps(entry, sort_keys=True)),
        }
    return reply


async def test_replies_are_those_of_stock_qemu(tmp_path):
    async with both(tmp_path) as (qemu, vring):
        hello = await vring.reply()
        assert hello["QMP"].keys() == (await qemu.reply())["QMP"].keys()
        for request in SAME:
            wanted, got = await qemu.reply(request), await vring.reply(request)
            assert comparable(got) == comparable(wanted), request
        for request in ALIKE:
            wanted, got = await qemu.reply(request), await vring.reply(request)
            assert got["error"]["class"] == wanted["error"]["class"], request


async def test_a_port_goes_without_the_guests_word(tmp_path):
    """Neither guest runs: no driver hears of it, and none is waited for."""
    async with both(tmp_path) as (qemu, vring):
        for side in (qemu, vring):
            await side.reply()
            await side.reply('{"execute":"qmp_capabilities"}')
            await side.reply(add("null", "z"))
            await side.reply(device(bus="virtio-serial0.0", chardev="z", id="p0", nr=5))
            gone = await side.reply('{"execute":"device_del","arguments":{"id":"p0"}}')
            assert gone == {"return": {}}
            assert {"device": "p0", "path": "/machine/peripheral/p0"} in await side.told(
                "DEVICE_DELETED"
            )
            again = device(bus="virtio-serial0.0", chardev="z", id="p1", nr=5)
            assert await side.reply(again) == {"return": {}}


async def test_every_command_of_qemus_takes_what_it_takes_there(tmp_path):
    """The schema of commands that QEMU has too: the same members, the same types of JSON."""
    async with both(tmp_path) as (qemu, vring):
        for side in (qemu, vring):
            await side.reply()
            await side.reply('{"execute":"qmp_capabilities"}')
        theirs, ours = [
            {e["name"]: e for e in (await side.reply('{"execute":"query-qmp-schema"}'))["return"]}
            for side in (qemu, vring)
        ]
        compared = 0
        for name, entry in ours.items():
            if entry["meta-type"] not in ("command", "event") or name.lower().startswith("x-vring"):
                continue
            if name.startswith("X_VRING"):
                continue
            if name in ("chardev-add", "chardev-change"):
                variants(ours, theirs, entry)
            assert theirs[name]["meta-type"] == entry["meta-type"]
            assert members(ours, entry["arg-type"]) == members(theirs, theirs[name]["arg-type"])
            compared += 1
        assert compared > 15


def members(schema, type):
    """The members of an object by name: what JSON they are, and whether they may be absent."""
    return {
        member["name"]: (json_type(schema, member["type"]), "default" in member)
        for member in schema[type]["members"]
    }


def variants(ours, theirs, entry):
    """What may be said of each kind of chardev is what may be said there, or less."""
    tag = {m["name"]: m["type"] for m in ours[entry["arg-type"]]["members"]}["backend"]
    other = {m["name"]: m["type"] for m in theirs[theirs[entry["name"]]["arg-type"]]["members"]}
    known = {v["case"]: v["type"] for v in theirs[other["backend"]]["variants"]}
    for variant in ours[tag]["variants"]:
        (data,) = (m["type"] for m in ours[variant["type"]]["members"])
        (their_data,) = (m["type"] for m in theirs[known[variant["case"]]]["members"])
        here = members(ours, data)
        for name in OURS:
            del here[name]
        assert here.items() <= members(theirs, their_data).items()


def json_type(schema, type):
    entry = schema[type]
    if entry["meta-type"] == "builtin":
        return entry["json-type"]
    return {"enum": "string"}.get(entry["meta-type"], entry["meta-type"])
