"""A stock SPICE client, our server, our device, and a guest with an agent."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

from tests.support.processes import end
from tests.support.waiting import until, until_gives
from vring_serial import AgentError, AgentRouter, EmbeddedGuest, SpiceOptions
from vring_serial.agent.guest import AGENT_PORT, GuestAgent
from vring_serial.chardev import Chardev
from vring_serial.chardev.protocol import ProtocolChardev
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.guest.port import GuestPort
from vring_serial.guest.services import keep_serving
from vring_serial.guest.uml import UmlGuest
from vring_serial.guest.uml_desktop import MEMORY_MIB, UmlDesktop
from vring_serial.proto.agent import Selection
from vring_serial.spice.server import SpiceServer
from vring_serial.transport.vhost_user.backend import VhostUserBackend

CLIENT = Path(__file__).parents[1] / "peers" / "spice" / "client.py"
PASSWORD = "hush"
SELECTIONS = {
    "clipboard": Selection.CLIPBOARD,
    "primary": Selection.PRIMARY,
    "secondary": Selection.SECONDARY,
}


class Client:
    """The client's process, and the events that it told.

    Attributes:
        events: all of them, each a list of its name and arguments.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.events: list[list[Any]] = []
        self._process = process
        self._changed = asyncio.Condition()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls) -> Client:
        process = await asyncio.create_subprocess_exec(
            "/usr/bin/python3", str(CLIENT), limit=64 << 20,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        return cls(process)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            self.events.append(json.loads(line))
            async with self._changed:
                self._changed.notify_all()
        self.events.append(["ended"])
        async with self._changed:
            self._changed.notify_all()

    def do(self, command: str, *arguments: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, *arguments]).encode() + b"\n")

    async def wait(self, *start: object, seconds: float = 20) -> list[Any]:
        """The rest of the first event that begins like this; it and those before are forgotten."""

        def find() -> int | None:
            for index, event in enumerate(self.events):
                if event[: len(start)] == list(start):
                    return index
            return None

        try:
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: find() is not None)
        except TimeoutError:
            raise AssertionError(f"no {start} in {str(self.events)[:2000]}") from None
        index = find()
        assert index is not None
        event = self.events[index]
        del self.events[: index + 1]
        return event[len(start) :]

    async def wait_agent(self) -> int:
        """Wait until the agent is there and its capabilities are known; returns these."""
        while True:
            connected, capabilities = await self.wait("agent")
            if connected and capabilities:
                return int(capabilities)

    async def wait_negotiated(self) -> None:
        """Wait until client and agent have told each other everything, each twice as they may.

        A grab in between is lost: the agent forgets serials whenever it is asked anew. It asks, if
        it does, before it answers the client, and answers in order: once a request for a clipboard
        is answered, be it with nothing, the client has been asked and has answered.
        """
        await self.wait_agent()
        await self.receive(Selection.SECONDARY)

    async def wait_data(self, *start: object, seconds: float = 20) -> bytes:
        (text,) = await self.wait(*start, seconds=seconds)
        return base64.b64decode(text)

    async def receive(self, selection: int, seconds: float = 30) -> bytes:
        """Ask for the guest's clipboard and wait for it; empty if there is none."""
        self.do("request", selection)
        _, text = await self.wait("received", selection, seconds=seconds)
        return base64.b64decode(text)

    async def kill(self) -> None:
        """End the process with no chance to say good-bye."""
        await end(self._process, self._reading)
        assert self._process.stdin is not None
        self._process.stdin.close()


class EmbeddedSide:
    """The embedded guest with its own agent."""

    selections = ("clipboard", "primary", "secondary")

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._downloads = directory / "downloads"
        self._guest = EmbeddedGuest(str(directory / "vring.sock"))
        self._serving: asyncio.Future[None] | None = None
        self.agent = GuestAgent()

    async def start(self) -> None:
        await self._guest.start()
        await self.start_agent()

    async def wait_port(self) -> GuestPort:
        """The agent's port."""
        return await self._guest.wait_port(name=AGENT_PORT)

    async def start_agent(self) -> None:
        port = await self.wait_port()
        self.agent = GuestAgent(downloads=self._downloads)
        self._serving = asyncio.ensure_future(keep_serving(port, self.agent.run))

    async def has_agent(self) -> bool:
        return self._serving is not None and not self._serving.done()

    async def stop_agent(self) -> None:
        assert self._serving is not None
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)

    async def resized(self, width: int, height: int) -> bool:
        await until(
            lambda: [(m.width, m.height) for m in self.agent.monitors[:1]] == [(width, height)]
        )
        return True

    async def copy(self, text: str, selection: str) -> None:
        self.agent.set_clipboard(text, SELECTIONS[selection])

    async def release(self, selection: str) -> None:
        self.agent.clear_clipboard(SELECTIONS[selection])

    async def pasted(self, text: str | None, selection: str) -> None:
        """Wait until this is what is pasted; None for nothing."""
        await until_gives(lambda: self._paste(selection), text)

    async def _paste(self, selection: str) -> str | None:
        try:
            return (await self.agent.get_clipboard(SELECTIONS[selection])).decode()
        except AgentError:
            return None

    async def file(self, name: str) -> bytes | None:
        """What is in a file that was received; None if there is none."""
        path = self._downloads / name
        return path.read_bytes() if path.exists() else None

    async def aclose(self) -> None:
        await self.stop_agent()
        await self._guest.aclose()


class UmlSide:
    """A real Linux with the real agent on an X server."""

    #: The agent knows no third selection: it ignores a grab, and answers a request with nothing.
    selections = ("clipboard", "primary")

    def __init__(self, directory: Path) -> None:
        self._guest = UmlGuest([directory / "vring.sock"], memory_mib=MEMORY_MIB)
        self._desktop = UmlDesktop(self._guest)

    async def start(self) -> None:
        await self._guest.start()
        await self._desktop.start()

    async def start_agent(self) -> None:
        await self._desktop.restart_agent()

    async def has_agent(self) -> bool:
        """Whether both halves of it run."""
        running = await self._guest.run("pgrep -x spice-vdagentd && pgrep -x spice-vdagent")
        return running.status == 0

    async def stop_agent(self) -> None:
        await self._guest.run("pkill -9 -x 'spice-vdagentd?'; true")

    async def resized(self, width: int, height: int) -> bool:
        """Whether the screen was resized: the daemon of 0.22 rejects what spice-gtk sends."""
        log = ""
        async with asyncio.timeout(20):
            while await self._desktop.resolution() != (width, height):
                log = (await self._guest.run("cat /tmp/vdagentd.log")).output
                if "invalid message size" in log:
                    return False
        return True

    async def copy(self, text: str, selection: str) -> None:
        await self._desktop.copy(text, selection)

    async def release(self, selection: str) -> None:
        """Whoever has the selection ends."""
        await self._guest.run("pkill -x xclip")

    async def _paste(self, selection: str) -> str | None:
        """Through a file, since the guest's console is no place for a mebibyte."""
        result = await self._guest.run(
            f"DISPLAY=:0 timeout 10 xclip -out -selection {selection} -target UTF8_STRING"
            " >/mnt/pasted 2>/dev/null"
        )
        return (self._guest.share / "pasted").read_text() if result.status == 0 else None

    async def pasted(self, text: str | None, selection: str) -> None:
        await until_gives(lambda: self._paste(selection), text)

    async def file(self, name: str) -> bytes | None:
        result = await self._guest.run(f"cp /tmp/downloads/{name} /mnt/received")
        if result.status:
            return None
        path = self._guest.share / "received"
        data = path.read_bytes()
        path.unlink()
        return data

    async def aclose(self) -> None:
        await self._guest.aclose()


Side = EmbeddedSide | UmlSide


class SpiceBench:
    """Server, device and guest.

    Args:
        directory: for sockets and files.
        shared: the server is one of the clients of a router, as with ``--agent-socket``.
        options: of the server.

    Attributes:
        guest: the guest's side.
        port: where SPICE clients connect.
        socket: where others connect, if the agent is shared.
    """

    def __init__(self, directory: Path, *, shared: bool = False, **options: object) -> None:
        self.directory = directory
        self.socket = directory / "agent.sock"
        self.router: AgentRouter | None = None
        self._others: asyncio.Server | None = None
        if shared:
            self.router = AgentRouter()
        usual: dict[str, object] = {"autoport": True, "addr": "127.0.0.1", "password": PASSWORD}
        if options.get("disable_ticketing"):
            del usual["password"]
        self.server = SpiceServer(SpiceOptions(**{**usual, **options}))  # type: ignore[arg-type]
        self.controller = Controller()
        self.backend = VhostUserBackend(self.controller, str(directory / "vring.sock"))
        self._guest: Side | None = None
        self._clients: list[Client] = []

    @property
    def guest(self) -> Side:
        assert self._guest is not None, "not started"
        return self._guest

    @property
    def port(self) -> str:
        return self.server.addresses[0].rpartition(":")[2]

    async def start(self, kind: type[Side] = EmbeddedSide) -> None:
        await self.server.start()
        self.controller.add_port(Port(1, AGENT_PORT, await self._agent_end()))
        await self.controller.start()
        await self.backend.start()
        self._guest = kind(self.directory)
        await self._guest.start()

    async def _agent_end(self) -> Chardev:
        if self.router is None:
            return self.server.agent_chardev("agent")
        device = self.server.agent_device()
        self.router.connect_server(device, device.closed)
        loop = asyncio.get_running_loop()
        self._others = await loop.create_unix_server(self.router.client_factory, str(self.socket))
        return ProtocolChardev("agent", self.router.protocol_factory)

    async def connect(self, **properties: object) -> Client:
        """A client that connects, with these properties of its session instead of the usual."""
        client = await Client.start()
        self._clients.append(client)
        usual = {"host": "127.0.0.1", "port": self.port, "password": PASSWORD}
        client.do("connect", {**usual, **properties})
        return client

    async def kill_clients(self) -> None:
        for client in self._clients:
            await client.kill()
        self._clients.clear()

    async def settle(self) -> bool:
        """Kill all clients; whether the guest has its agent. It keeps files and clipboards."""
        await self.kill_clients()
        return await self.guest.has_agent()

    async def aclose(self) -> None:
        await self.kill_clients()
        if self._guest is not None:
            await self._guest.aclose()
        await self.backend.aclose()
        await self.controller.aclose()
        await self.server.aclose()
        if self.router is not None:
            await self.router.aclose()
        if self._others is not None:
            self._others.close()
            await self._others.wait_closed()


async def start_bench(
    directory: Path, kind: type[Side] = EmbeddedSide, **options: Any
) -> SpiceBench:
    """A bench that has started; options are those of the bench."""
    bench = SpiceBench(directory, **options)
    try:
        await bench.start(kind)
    except BaseException:
        await bench.aclose()
        raise
    return bench
