"""``vring serve --keeper``: a keeper, and a worker that may be killed without interruption."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from functools import partial

from vring_serial.cli import logs, status_of
from vring_serial.cli.logs import emit
from vring_serial.cli.pidfile import pid_file
from vring_serial.cli.server import Settings, serve
from vring_serial.cli.signals import run
from vring_serial.config.topology import Topology
from vring_serial.errors import ResourceError
from vring_serial.service.keeper import Inheritance, Keeper, WorkerSpec
from vring_serial.service.shelf import open_shelf


@dataclass(frozen=True, slots=True)
class LogSettings:
    """The log settings of a worker; see ``vring_serial.cli.logs.configure``.

    Attributes:
        level: the lowest level that is logged.
        as_json: whether each line is a JSON object.
        path: file to append to; None for standard error.
    """

    level: str
    as_json: bool
    path: str | None


def serve_kept(topology: Topology, settings: Settings, log: LogSettings) -> int:
    """Serve with a keeper until the first SIGINT or SIGTERM; return the exit status.

    Raises ResourceError: the log's reader has stopped already, or the pid file is in use.
    """
    if not logs.end():
        raise ResourceError("the log is not read, and a keeper cannot begin with a thread")
    worker = partial(_work, topology, dataclasses.replace(settings, pid_file=None), log)
    with pid_file(settings.pid_file):
        keeper = Keeper(
            [WorkerSpec(settings.sockets[0], worker)], partial(logs.write_now, as_json=log.as_json)
        )
        return keeper.run()


def _work(
    topology: Topology, settings: Settings, log: LogSettings, inheritance: Inheritance
) -> int:
    """Serve in the worker's process."""

    def work() -> None:
        logs.configure(log.level, as_json=log.as_json, path=log.path)
        shelf = open_shelf(inheritance.journal, inheritance.notifier, inheritance.descriptors)

        def serving() -> None:
            if forgotten := shelf.drop_untaken():
                text = f"the worker before left what nobody knows: {', '.join(forgotten)}"
                emit(logging.WARNING, "forgotten", text)
            inheritance.notifier.notify("READY=1")

        with shelf:
            run(serve(topology, settings, shelf, serving))

    return status_of(work)
