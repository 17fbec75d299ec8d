"""``vring serve --descriptor-store``: the service manager keeps what a successor needs."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import NoReturn

from vring_serial.cli.kept import say_well
from vring_serial.cli.logs import emit
from vring_serial.cli.origin import Origin
from vring_serial.cli.server import Kept, Settings, serve
from vring_serial.config.vms import VmConfig
from vring_serial.errors import ConfigError, StateError
from vring_serial.service.descriptor_store import Notifier, connect
from vring_serial.service.manager_store import JOURNAL, ManagerStore, open_manager_shelf
from vring_serial.service.shelf import Shelf
from vring_serial.service.systemd import watchdog_seconds
from vring_serial.service.watchdog import ANSWERS


async def serve_stored(vms: Sequence[VmConfig], settings: Settings, origin: Origin) -> None:
    """Serve until SIGTERM, after which another process goes on, or SIGINT, which ends all.

    Raises ConfigError: no service manager has started this process; otherwise as ``serve``.
    """
    watchdog = watchdog_seconds(os.environ)
    if (address := os.environ.pop("NOTIFY_SOCKET", None)) is None:
        raise ConfigError("nobody keeps anything: there is no NOTIFY_SOCKET", "--descriptor-store")
    shelf, store, goes_on = _open(address, origin)

    def serving() -> None:
        if forgotten := shelf.drop_untaken():
            text = f"the process before left what nobody knows: {', '.join(forgotten)}"
            emit(logging.WARNING, "forgotten", text)
        shelf.serving()
        if watchdog is not None:
            say_well(store, watchdog / ANSWERS)

    def handed_over() -> NoReturn:
        shelf.stopped()
        os._exit(0)

    with shelf:
        kept = Kept(shelf, serving, handed_over, restarts=int(goes_on), by_manager=True)
        await serve(vms, settings, kept)
        # It has ended for good: the next one begins anew.
        store.remove(JOURNAL)
    store.close()


def _open(address: str, origin: Origin) -> tuple[Shelf, ManagerStore, bool]:
    """Return the shelf, the way to the manager, and whether a predecessor left something."""
    try:
        return *open_manager_shelf(connect(address), origin.stored), JOURNAL in origin.stored
    except StateError as error:
        text = f"what the service manager has cannot be gone on with: {error}"
        emit(logging.ERROR, "store_damaged", text)
    notifier = Notifier(connect(address))
    for name in origin.stored:
        notifier.remove(name)
    notifier.close()
    return *open_manager_shelf(connect(address), {}), False
