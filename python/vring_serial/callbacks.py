"""Call functions that users supply; log what they raise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, TypeVarTuple, overload

from vring_serial.errors import LocalProtocolError
from vring_serial.ratelimit import RateLimitedLog

Arguments = TypeVarTuple("Arguments")
FunctionT = TypeVar("FunctionT", bound=Callable[..., object])


class Listener(Generic[FunctionT]):
    """An attribute for a function that users supply: None, or one listener and no second one.

    Setting it while another function is set raises LocalProtocolError; None removes the listener.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        self._slot = f"_{name}"

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> FunctionT | None: ...
    def __get__(self, instance: Any, owner: type) -> Self | FunctionT | None:
        if instance is None:
            return self
        found: FunctionT | None = instance.__dict__.get(self._slot)
        return found

    def __set__(self, instance: Any, function: FunctionT | None) -> None:
        current = instance.__dict__.get(self._slot)
        if function is not None and current is not None and current != function:
            raise LocalProtocolError(f"{self._name} has a listener already; set it to None first")
        instance.__dict__[self._slot] = function


def tell(
    log: RateLimitedLog,
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
        log.log(logging.ERROR, "%s failed", what, exc_info=error)
