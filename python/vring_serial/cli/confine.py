"""Entering the sandbox, and what the log says of it."""

from __future__ import annotations

import logging

from vring_serial.cli import logs
from vring_serial.cli.logs import emit
from vring_serial.service.reach import Reach
from vring_serial.service.sandbox import NO_SANDBOX, Sandbox, enter


def confine(sandbox: Sandbox, reach: Reach) -> None:
    """Give up for ever what this process does not need, and log what that came to.

    Args:
        sandbox: its layers.
        reach: what the process still needs.

    Raises:
        ResourceError: a layer that the system has could not be made.
    """
    if sandbox == NO_SANDBOX:
        emit(logging.INFO, "sandbox", "sandbox: off")
        return
    text = f"sandbox: system call {logs.NAME} is not allowed; the process ends here"
    entered = enter(sandbox, reach, logs.last_words(text))
    missing = f"; not to be had: {', '.join(entered.missing)}" if entered.missing else ""
    emit(
        logging.INFO,
        "sandbox",
        f"sandbox: {', '.join(entered.on)}{missing}",
        on=entered.on,
        missing=entered.missing,
    )
    if entered.unwritable:
        text = f"sandbox: files here cannot be made or removed any more: {entered.unwritable}"
        emit(logging.WARNING, "sandbox_unwritable", text, directories=entered.unwritable)
