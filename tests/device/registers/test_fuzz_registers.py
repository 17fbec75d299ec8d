"""The fuzz target of registers, with Hypothesis in the place of libFuzzer."""

from __future__ import annotations

import logging
import random

import registers
from hypothesis import given, settings
from hypothesis import strategies as st


@given(st.binary(max_size=800))
@settings(max_examples=60)
def test_any_guest_gets_answers(data):
    logging.disable(logging.WARNING)
    try:
        registers.one_input(data)
    finally:
        logging.disable(logging.NOTSET)


def test_guests_that_go_on_for_long():
    logging.disable(logging.WARNING)
    try:
        for seed in range(24):
            data = random.Random(seed).randbytes(8 * 300)
            registers.one_input(bytes([seed]) + data)
    finally:
        logging.disable(logging.NOTSET)
