"""``vring bench``: the speed of ports on this machine, as tables, a file and a plot."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vring_serial.cli import PATH, interrupts_end_at_once
from vring_serial.cli.tables import show
from vring_serial.errors import ConfigError

_CONTEXT = {"help_option_names": ["-h", "--help"]}
_QUICK_SIZES = (64, 4 << 10, 64 << 10)
LARGEST_SIZE = 16 << 20
#: More ports would need more queues than vhost-user can number.
MOST_PORTS = 125
GROUPS = ("transfer", "latency", "rings")
#: Width in columns of tables that are not printed to a terminal.
WIDTH = 120


class BenchGroup(click.Group):
    """The group ``vring bench``, which without a command measures everything."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the command ``all`` if none is given."""
        if not args or (args[0].startswith("-") and args[0] not in self.get_help_option_names(ctx)):
            args.insert(0, "all")
        return super().parse_args(ctx, args)


@click.group("bench", cls=BenchGroup, context_settings=_CONTEXT)
def bench_command() -> None:
    """Measure ports on this machine.

    Device, guest and peer are separate processes, as in production: `vring serve` on a vhost-user
    socket, the embedded guest's driver, and a process at the port's unix socket. Every measurement
    alternates with a yardstick, so that a busy machine affects both equally. (`rings` runs in one
    thread and measures the instructions per chain.)

    Without a command, it measures everything. `vring bench all --help` shows the options.
    """


def _numbers(least: int, most: int) -> Callable[[Any, Any, str], tuple[int, ...]]:
    def parse(_ctx: click.Context, param: click.Parameter, text: str) -> tuple[int, ...]:
        units = {"K": 10, "M": 20}
        numbers = []
        for word in text.split(","):
            unit = word[-1:].upper()
            digits = word[:-1] if unit in units else word
            if not digits.isdecimal() or len(digits) > 12:
                raise click.BadParameter(f"{word!r} is not a number", param=param)
            number = int(digits) << units.get(unit, 0)
            if not least <= number <= most:
                raise click.BadParameter(f"{word!r} is not in {least} to {most}", param=param)
            numbers.append(number)
        return tuple(dict.fromkeys(numbers))

    return parse


_OPTIONS: Sequence[Callable[[Any], Any]] = (
    click.option(
        "--sizes",
        metavar="BYTES,...",
        default="64,256,1K,4K,16K,64K,256K,1M",
        callback=_numbers(1, LARGEST_SIZE),
        help="Sizes of messages.",
        show_default=True,
    ),
    click.option(
        "--ports",
        metavar="N,...",
        default="1,16",
        callback=_numbers(1, MOST_PORTS),
        help="How many ports work at the same time.",
        show_default=True,
    ),
    click.option(
        "--ring", type=click.Choice(["split", "packed", "both"]), default="both",
        help="Which kind of ring.", show_default=True,
    ),
    click.option("--rounds", type=click.IntRange(1, 1000), default=5, show_default=True),
    click.option(
        "--messages", type=click.IntRange(1, 100_000_000), default=250_000,
        help="Most messages of one sample.", show_default=True,
    ),
    click.option(
        "--pings", type=click.IntRange(5, 1_000_000), default=5000, help="Round trips.",
        show_default=True,
    ),
    click.option(
        "--queue-size", type=click.IntRange(2, 1024), default=256, show_default=True,
        help="Descriptors per queue.",
    ),
    click.option(
        "--receive-size", type=click.IntRange(64, 1 << 20), default=4096, show_default=True,
        help="Bytes of a guest's receive buffer; Linux has 4096.",
    ),
    click.option(
        "--busy-poll", type=click.IntRange(1, 1_000_000), default=1000, show_default=True,
        help="Microseconds that the device polls where that is measured.",
    ),
    click.option("--quick", is_flag=True, help="Fewer sizes and rounds: seconds, not minutes."),
    click.option(
        "--json", "json_path", type=PATH, metavar="FILE", help="Write all samples to a file."
    ),
    click.option(
        "--plot", "plot_path", type=PATH, metavar="FILE.png|svg", help="Draw them (vring[plot])."
    ),
)  # fmt: skip


def _measuring(groups: Sequence[str]) -> Callable[[Callable[..., None]], click.Command]:
    def decorate(function: Callable[..., None]) -> click.Command:
        for option in reversed(_OPTIONS):
            function = option(function)
        command = bench_command.command(context_settings=_CONTEXT)(function)
        command.callback = lambda **options: _run(groups, **options)
        return command

    return decorate


@_measuring(GROUPS)
def all(**options: Any) -> None:  # the name of the command
    """Run all measurements, one after the other."""


@_measuring(("transfer",))
def transfer(**options: Any) -> None:
    """Measure throughput over message size, both ways, through one port and many."""


@_measuring(("latency",))
def latency(**options: Any) -> None:
    """Measure round trips of 64 bytes: through a FIFO, to a process, with busy-poll."""


@_measuring(("rings",))
def rings(**options: Any) -> None:
    """Measure the time per chain, with driver and device in one thread."""


@bench_command.command("compare", context_settings=_CONTEXT)
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
def compare(before: str, after: str) -> None:
    """Compare two --json files: how much faster or slower B is."""
    from vring_serial.bench.results import Report
    from vring_serial.bench.tables import comparison

    table, count = comparison(Report.load(before), Report.load(after))
    if not count:
        raise ConfigError(f"{before} and {after} have no measurement in common")
    show(Console(), table)


def _run(
    groups: Sequence[str],
    *,
    quick: bool,
    json_path: str | None,
    plot_path: str | None,
    sizes: tuple[int, ...],
    ports: tuple[int, ...],
    ring: str,
    rounds: int,
    **numbers: Any,
) -> None:
    # Numpy, the guest and matplotlib are loaded only when something is measured.
    with interrupts_end_at_once():
        from vring_serial.bench.measure import RINGS, Settings, latency_steps, transfer_steps
        from vring_serial.bench.plot import check_plot, save_plot
        from vring_serial.bench.results import METHOD, Report, Result, this_machine
        from vring_serial.bench.rings import ring_steps
        from vring_serial.bench.tables import tables

    for option, path in (("--json", json_path), ("--plot", plot_path)):
        if path is not None and not os.path.isdir(os.path.dirname(path) or "."):
            raise ConfigError(f"{path!r}: there is no such directory", option)
    if plot_path is not None:
        check_plot(plot_path)
    # So that the measured processes end with this one.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    if quick:
        sizes, rounds = _QUICK_SIZES, min(rounds, 3)
    settings = Settings(
        sizes=sizes,
        ports=ports,
        rings=RINGS if ring == "both" else (ring,),
        rounds=rounds,
        **numbers,
    )
    makers = {"transfer": transfer_steps, "latency": latency_steps, "rings": ring_steps}
    steps = [step for group in groups for step in makers[group](settings)]
    machine = this_machine()
    results: list[Result] = []
    # In a file nothing has to be left out.
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        total = sum(step.count for step in steps)
        task = progress.add_task("", total=total)
        for step in steps:
            progress.update(task, description=step.title)
            for result in step.run():
                results.append(result)
                progress.advance(task)
    report = Report(results, machine)
    for table in tables(report):
        show(console, table)
    console.print(f"[dim]{METHOD[0].upper()}{METHOD[1:]}.[/]", highlight=False)
    if json_path is not None:
        report.save(json_path)
    if plot_path is not None:
        save_plot(report, plot_path)
