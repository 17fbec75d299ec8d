"""A vfio-user client and its guest notice nothing, wherever the workers that serve them die."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import number_of

PROGRAM = Path(__file__).with_name("dying_client.py")
#: One life in so many is tried, from the first that is given on.
OF = 8


@pytest.mark.parametrize(
    ("layout", "first"), [("split", 1), ("packed", 3), ("split", 5), ("packed", 7)]
)
def test_a_worker_may_die_at_every_step_of_every_message(layout: str, first: int) -> None:
    assert number_of(PROGRAM, layout, str(first), str(OF)) > 40
