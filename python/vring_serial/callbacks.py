"""Calling what users hand us: their mistakes are logged and stop nothing of ours."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVarTuple

Arguments = TypeVarTuple("Arguments")


def tell(
    log: logging.Logger,
    what: str,
    function: Callable[[*Arguments], object] | None,
    *args: *Arguments,
) -> None:
    """Call ``function``, if there is one; log what it raises, as ``what``. Change state before."""
    if function is None:
        return
    try:
        function(*args)
    except Exception:
        log.exception("%s failed", what)
