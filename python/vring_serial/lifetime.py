"""The one vocabulary of objects that have a life, and the context managers that go with it.

==================  ======================  =======================  ===========================
base                begins                  ends                     as a context manager
==================  ======================  =======================  ===========================
:class:`Closing`    when it is made         ``close()``              ``with thing:``
:class:`Ending`     when it is made         ``await aclose()``       ``async with thing:``
:class:`Starting`   ``await start()``       ``await aclose()``       ``async with thing:``
==================  ======================  =======================  ===========================

``close`` and ``aclose`` may be called at any time and any number of times: before ``start``, while
it waits, after it failed. A cancelled ``aclose`` releases as much as one that is not. A ``start``
that raises or is cancelled leaves nothing behind.
"""

from __future__ import annotations

import abc
from types import TracebackType
from typing import Self


class Closing(abc.ABC):
    """Ends synchronously."""

    __slots__ = ()

    @abc.abstractmethod
    def close(self) -> None:
        """Release everything. Safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Ending(abc.ABC):
    """Lives from the moment it is made, and needs the event loop to end."""

    __slots__ = ()

    @abc.abstractmethod
    async def aclose(self) -> None:
        """Release everything. Safe to call twice."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


class Starting(Ending):
    """Does nothing until it is started."""

    __slots__ = ()

    @abc.abstractmethod
    async def start(self) -> None:
        """Begin. What it opened is closed again if it raises or is cancelled."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self
