"""Every part's state is plain: it can be written down, and CONTRIBUTING says whose it is."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import vring_serial
from vring_serial.saving import StateFormat

ROOT = Path(__file__).parents[1]
PACKAGE = Path(vring_serial.__file__).parent
#: Parts of a message or of other states, which need arguments.
PARTS = {"ControlPortState", "VringState", "MouseState"}


def state_classes() -> list[type]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        names = re.findall(r"^class (\w+State)\b", path.read_text(), re.MULTILINE)
        if names:
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            module = importlib.import_module(".".join(parts))
            found += [getattr(module, name) for name in names]
    return [cls for cls in found if dataclasses.is_dataclass(cls)]


STATES = [cls for cls in state_classes() if cls.__name__ not in PARTS]


@pytest.mark.parametrize("cls", STATES, ids=lambda cls: cls.__name__)
def test_a_state_can_be_made_of_nothing_and_written_down(cls: Any) -> None:
    state = cls()
    form = StateFormat("test", 1, cls)
    assert form.unpack(form.pack(state)) == state
    assert copy.deepcopy(state) == state


@pytest.mark.parametrize("cls", STATES, ids=lambda cls: cls.__name__)
def test_a_state_says_what_each_field_is(cls: Any) -> None:
    said = re.search(r"Attributes:\n(.*)", cls.__doc__ or "", re.DOTALL)
    assert said is not None
    names = re.findall(r"^        ((?:\w+, )*\w+):", said[1], re.MULTILINE)
    assert {field.name for field in dataclasses.fields(cls)} == set(", ".join(names).split(", "))


def test_contributing_names_every_state_and_no_other() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## State\n") : text.index("## What is public\n")]
    named = set(re.findall(r"`(?:[\w.]+\.)?(\w+State)`", section)) - {"..."}
    assert named == {cls.__name__ for cls in STATES} | {"ControlPortState"}
