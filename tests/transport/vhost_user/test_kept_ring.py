"""A ring that runs moves every byte once, wherever the worker dies that starts or stops it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import number_of
from tests.transport.vhost_user.dying_ring import CASES

PROGRAM = Path(__file__).with_name("dying_ring.py")


#: Each message with one layout, and the one that frontends begin with by both.
LAYOUTS = [
    ("SET_VRING_ENABLE", "split"),
    ("SET_VRING_ENABLE", "packed"),
    ("SET_VRING_KICK", "packed"),
    ("SET_VRING_ADDR", "split"),
    ("SET_VRING_NUM", "packed"),
    ("SET_VRING_KICK again", "split"),
    ("SET_VRING_ENABLE 0", "split"),
    ("GET_VRING_BASE", "packed"),
    ("SET_MEM_TABLE", "split"),
    ("SET_MEM_TABLE twice", "packed"),
    ("SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG together", "split"),
]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_a_worker_may_die_at_every_step_of_a_message(name: str, layout: str) -> None:
    assert number_of(PROGRAM, layout, name) > 5


def test_every_message_is_tried() -> None:
    assert {name for name, _ in LAYOUTS} == set(CASES)


def test_a_ring_that_has_come_round_is_no_new_drivers() -> None:
    assert number_of(PROGRAM, "packed", "round") == 1
