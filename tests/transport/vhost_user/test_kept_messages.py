"""Every message of a frontend is handled once in effect, wherever its worker dies."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import number_of
from tests.transport.vhost_user.dying_session import CASES

PROGRAM = Path(__file__).with_name("dying_session.py")


@pytest.mark.parametrize("name", CASES)
def test_a_worker_may_die_at_every_step_of_a_message(name: str) -> None:
    assert number_of(PROGRAM, name) > 10
