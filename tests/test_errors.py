"""The hierarchy of errors is the one that `vring_serial.errors` draws."""

from __future__ import annotations

import builtins
import importlib
import pkgutil
import re
from collections.abc import Iterator

import vring
import vring_serial
from vring.errors import Error
from vring_serial import errors


def drawn() -> Iterator[tuple[str, str, str | None]]:
    """Name, base and built-in base of each error in the picture, but the first."""
    assert errors.__doc__ is not None
    line = re.compile(r"^( {4,})([A-Z]\w+)(?: +\((\w+)\))?", re.MULTILINE)
    above: list[str] = []
    for indent, name, builtin in line.findall(errors.__doc__):
        depth = len(indent) // 4 - 1
        if depth:
            yield name, above[depth - 1], builtin or None
        above[depth:] = [name]


def there() -> Iterator[tuple[str, str, str | None]]:
    """The same of the classes; those that never leave the package have no place in it."""
    for package in (vring, vring_serial):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    found = [Error]
    for kind in found:
        for sub in kind.__subclasses__():
            if not sub.__name__.startswith("_") and sub not in found:
                found.append(sub)
                ours, *others = sub.__bases__
                yield sub.__name__, ours.__name__, others[0].__name__ if others else None


#: Raised and caught within one session.
INNER = {"FatalError", "NotThereError", "FramingError"}


def test_the_picture_is_what_there_is() -> None:
    classes = {entry for entry in there() if entry[0] not in INNER}
    assert sorted(classes, key=str) == sorted(drawn(), key=str)


def test_all_that_time_out_or_lose_their_peer_are_drawn_so() -> None:
    for name, _, builtin in drawn():
        expected = (
            "TimeoutError" if "Timeout" in name
            else "ConnectionError" if re.search("Gone|Closed|Ended|Removed", name)
            else None
        )  # fmt: skip
        assert builtin == expected, name
        assert builtin is None or hasattr(builtins, builtin)


def test_one_base_catches_all() -> None:
    assert vring.Error is vring_serial.Error is Error
    assert not issubclass(vring_serial.VringSerialError, vring.VringError)
    assert not issubclass(vring_serial.RemoteProtocolError, vring_serial.LocalProtocolError)
