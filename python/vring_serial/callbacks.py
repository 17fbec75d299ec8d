"""Calling what users hand us: their mistakes are logged and stop nothing of ours."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVarTuple

from vring_serial.ratelimit import RateLimitedLog

Arguments = TypeVarTuple("Arguments")


def tell(
    said: RateLimitedLog,
    what: str,
    function: Callable[[*Arguments], object] | None,
    *args: *Arguments,
) -> None:
    """Call ``function``, if there is one; log what it raises, as ``what``.

    Our own state is changed before: the function may look at it, or change it again.
    """
    if function is None:
        return
    try:
        function(*args)
    except Exception as error:
        said.log(logging.ERROR, "%s failed", what, exc_info=error)
