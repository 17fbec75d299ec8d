from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vring_serial.config.words import parse_bool, parse_int, parse_size, shorten, suggest


@pytest.mark.parametrize("text", ["on", "yes", "true", "y"])
def test_true(text: str) -> None:
    assert parse_bool(text) is True


@pytest.mark.parametrize("text", ["off", "no", "false", "n"])
def test_false(text: str) -> None:
    assert parse_bool(text) is False


@pytest.mark.parametrize("text", ["", "ON", "1", "0", "enabled", "on "])
def test_neither(text: str) -> None:
    with pytest.raises(ValueError, match="neither on nor off"):
        parse_bool(text)


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("31", 31), ("0x1f", 31), ("0X1F", 31), ("007", 7)]
)
def test_numbers(text: str, value: int) -> None:
    assert parse_int(text) == value


@pytest.mark.parametrize("text", ["", "-1", "+1", "1.0", "0x", "1_000", " 1", "٣", "9" * 5000])
def test_no_numbers(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number"):
        parse_int(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("64", 64), ("64k", 65536), ("64K", 65536), ("2M", 2097152), ("1G", 1 << 30)],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "K", "64T", "0x40", "-1", "1 K", "9" * 13])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_suggestion_names_the_closest_and_all() -> None:
    assert suggest("pth", ["server", "path"]) == "did you mean path? known: path, server"
    assert suggest("zzz", ["server", "path"]) == "known: path, server"


@given(st.text(max_size=300))
def test_shortened_text_is_short_and_printable(text: str) -> None:
    shown = shorten(text)
    assert shown.isprintable()
    assert len(shown) < 65 * 10 + 3
