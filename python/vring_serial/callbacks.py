"""Call functions that users supply; log what they raise."""

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
    """Call ``function`` unless it is None; log an exception as a failure of ``what``.

    Update the caller's own state first: the function may look at it or change it.
    """
    if function is None:
        return
    try:
        function(*args)
    except Exception as error:
        said.log(logging.ERROR, "%s failed", what, exc_info=error)
