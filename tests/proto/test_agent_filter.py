"""What the SPICE server's switches let through."""

from __future__ import annotations

import pytest

from vring_serial.proto.agent import AgentFilter, Capabilities, Capability, MessageType

CLIENT = Capabilities((0x35077,))  # what spice-gtk announces
COPY_PASTE = {4, 7, 8, 9}
FILE_XFER = {10, 11, 12}


@pytest.mark.parametrize("copy_paste", [True, False])
@pytest.mark.parametrize("file_xfer", [True, False])
def test_filter(copy_paste, file_xfer):
    rules = AgentFilter(copy_paste=copy_paste, file_xfer=file_xfer)
    dropped = (set() if copy_paste else COPY_PASTE) | (set() if file_xfer else FILE_XFER)
    assert {int(kind) for kind in MessageType if not rules.passes(kind)} == dropped
    assert rules.passes(99)
    seen = rules.rewrite(CLIENT.with_(3, 40))
    for capability in (3, 5, 6):
        assert (capability in seen) == copy_paste
    assert (Capability.FILE_XFER_DISABLED in seen) == (not file_xfer)
    assert 40 in seen
