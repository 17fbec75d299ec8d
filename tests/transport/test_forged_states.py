"""Whatever a session's state was made of, a successor names it, or serves, and serves the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import number_of

PROGRAM = Path(__file__).with_name("forged_states.py")
#: One forgery in so many is tried: a prime, which is no number of those for one value.
OF = 37


@pytest.mark.parametrize("protocol", ["vhost-user", "vfio-user"])
def test_no_forged_state_raises(protocol: str) -> None:
    assert number_of(PROGRAM, protocol, "0", str(OF)) > 100
