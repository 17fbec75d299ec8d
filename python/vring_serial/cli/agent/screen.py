"""``vring agent caps`` and ``vring agent resize``."""

from __future__ import annotations

import re

import click

from vring_serial.agent.host import HostAgent
from vring_serial.cli.agent.channel import Channel, json_option, print_json
from vring_serial.proto.agent import Monitor

#: Maximum size in pixels in X11 and Windows.
SIZE_MAX = 32767
_MONITOR = re.compile(r"(\d{1,6})x(\d{1,6})(?:([+-]\d{1,6})([+-]\d{1,6}))?")


class MonitorType(click.ParamType[Monitor]):
    """``1920x1080`` or ``1920x1080+1920+0``, in pixels."""

    name = "WxH[+X+Y]"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Monitor:
        match = _MONITOR.fullmatch(str(value))
        if match is None:
            self.fail(f"{value!r} is not a size such as 1920x1080 or 1920x1080+1920+0", param, ctx)
        width, height, x, y = (int(number or 0) for number in match.groups())
        if not (0 < width <= SIZE_MAX and 0 < height <= SIZE_MAX):
            self.fail(f"{value}: width and height are 1 to {SIZE_MAX} pixels", param, ctx)
        return Monitor(width, height, x, y)


@click.command("caps")
@json_option
@click.pass_obj
def caps_command(channel: Channel, as_json: bool) -> None:
    """List the capabilities of the guest's agent."""

    async def work(agent: HostAgent) -> None:
        assert agent.capabilities is not None
        names = agent.capabilities.names()
        if as_json or channel.as_json:
            print_json(names)
        else:
            click.echo("\n".join(names))

    channel.run(work)


@click.command("resize")
@click.argument("monitors", type=MonitorType(), nargs=-1, required=True)
@json_option
@click.pass_obj
def resize_command(channel: Channel, monitors: tuple[Monitor, ...], as_json: bool) -> None:
    """Set the guest's monitors; the first is the primary one.

    Several monitors need positions: `resize 1920x1080+0+0 1280x1024+1920+0`.
    """
    if len(monitors) > 1 and len({(m.x, m.y) for m in monitors}) < len(monitors):
        raise click.UsageError("several monitors need a position each, such as 1280x1024+1920+0")

    async def work(agent: HostAgent) -> None:
        await agent.set_monitors(monitors)
        if as_json or channel.as_json:
            keys = ("width", "height", "x", "y")
            print_json({"monitors": [{key: getattr(m, key) for key in keys} for m in monitors]})
            return
        sizes = " ".join(f"{m.width}x{m.height}{m.x:+}{m.y:+}" for m in monitors)
        click.echo(f"the guest took {sizes}")

    channel.run(work)
