"""The fuzz target of the protocols, with Hypothesis in the place of libFuzzer."""

from __future__ import annotations

import protocols
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("target", protocols.TARGETS, ids=lambda target: target.__name__)
@settings(max_examples=150)
@given(data=st.binary(min_size=1, max_size=600))
def test_any_input(target, data):
    target(data)


def test_a_body_before_a_broken_chunk_arrives_however_it_is_cut():
    """Found by the target: in one piece with the error, the bytes before it were dropped."""
    header = protocols.struct.pack("<IIQI", 1, 17, 0, 98)
    stream = protocols.struct.pack("<II", 2, 117) + header + b"a" * 97
    stream += protocols.struct.pack("<II", 2, 93)
    whole = protocols.agent_events(protocols.Side.HOST, [stream])
    assert whole[2][1:] == [b"a" * 97]
    assert "only 1 of TYPE_17" in whole[0][0]
    assert protocols.agent_events(protocols.Side.HOST, protocols.pieces(stream, 1)) == whole
