"""What a type checker sees of the front door; `make check` runs mypy on this, nothing runs it."""

from __future__ import annotations

import asyncio
from typing import assert_type

import vring_serial
from vring_serial import (
    AgentGone,
    AgentReady,
    AgentTimeoutError,
    Capabilities,
    Controller,
    DeviceEvent,
    EmbeddedGuest,
    GuestPort,
    HostAgent,
    Monitor,
    Port,
    PortOpened,
    ProtocolChardev,
    SocketChardev,
    SocketOptions,
    VfioUserServer,
    VhostUserBackend,
    VringSerialError,
)


def device(agent: HostAgent) -> Controller:
    controller = Controller(max_ports=4)
    controller.add_port(Port(1, "a", ProtocolChardev("agent", agent.protocol_factory)))
    controller.add_port(Port(2, "b", SocketChardev("data", SocketOptions(path="/run/data.sock"))))
    controller.on_event = told
    assert_type(controller.ports[1], Port)
    return controller


def told(event: DeviceEvent) -> None:
    match event:
        case PortOpened(side, nr):
            assert_type(side, vring_serial.Side)
            assert_type(nr, int)


def server(controller: Controller) -> VhostUserBackend | VfioUserServer:
    return VhostUserBackend(controller, "/run/vring.sock")


async def talk(agent: HostAgent) -> None:
    try:
        assert_type(await agent.wait_ready(timeout=1), Capabilities)
        await agent.set_monitors([Monitor(1920, 1080)])
    except AgentTimeoutError as error:
        root: VringSerialError = error
        raise root from None
    with agent.events() as events:
        async for event in events:
            if isinstance(event, AgentGone | AgentReady):
                return


async def guest(path: str) -> asyncio.StreamReader:
    async with EmbeddedGuest(path) as embedded:
        port = await embedded.wait_port(name="a")
        assert_type(port, GuestPort)
        reader, _ = await port.open()
        return reader
