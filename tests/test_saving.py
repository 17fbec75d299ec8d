"""The saved form of state: what was written comes back, and nothing else is taken."""

from __future__ import annotations

import dataclasses
import enum
import json
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vring_serial.errors import StateError
from vring_serial.saving import Packer, StateFormat, saved_length


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Flags(enum.IntFlag):
    ONE = 1
    TWO = 2


@dataclasses.dataclass
class Inner:
    data: bytes
    colour: Colour
    flags: Flags
    pair: tuple[int, str] | None


@dataclasses.dataclass
class Outer:
    number: int
    on: bool
    inner: list[Inner]
    by_index: dict[int, Inner]
    by_name: dict[str, tuple[int, ...]]

    def __post_init__(self):
        if self.number < 0:
            raise ValueError(f"number {self.number} is below 0")


FORMAT = StateFormat("outer", 1, Outer)
INNER = st.builds(
    Inner,
    st.binary(max_size=40),
    st.sampled_from(Colour),
    st.sampled_from([Flags(0), Flags.ONE, Flags.TWO, Flags.ONE | Flags.TWO]),
    st.none() | st.tuples(st.integers(-(1 << 64), 1 << 64), st.text(max_size=9)),
)
OUTER = st.builds(
    Outer,
    st.integers(0, 1 << 64),
    st.booleans(),
    st.lists(INNER, max_size=3),
    st.dictionaries(st.integers(-9, 1 << 40), INNER, max_size=3),
    st.dictionaries(st.text(max_size=9), st.lists(st.integers(0, 9)).map(tuple), max_size=3),
)
EXAMPLE = Outer(
    3,
    True,
    [Inner(b"\0x", Colour.BLUE, Flags.TWO, (1, "a"))],
    {-4: Inner(b"", Colour.RED, Flags(0), None)},
    {"k": ()},
)


@given(OUTER)
def test_what_was_saved_comes_back(state):
    saved = FORMAT.pack(state)
    assert FORMAT.unpack(saved) == state
    assert FORMAT.unpack(saved + b"what follows") == state
    assert saved_length(saved[:20]) == len(saved)


def forged(body, magic=b"VRINGST\n", layout=1, length=None, checksum=None):
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    length = len(body) if length is None else length
    checksum = zlib.crc32(body) if checksum is None else checksum
    return struct.pack("<8sIII", magic, layout, length, checksum) + body


def fields(**changes):
    whole = json.loads(FORMAT.pack(EXAMPLE)[20:])
    whole["state"].update(changes)
    return whole


INNER_FIELDS = {"data": "", "colour": "red", "flags": 0, "pair": None}


def inner(**changes):
    return fields(inner=[INNER_FIELDS | changes])


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "0 bytes are no saved state"),
        (b"x" * 19, "19 bytes are no saved state"),
        (FORMAT.pack(EXAMPLE)[:-1], "it is torn: "),
        (forged(b"{}", magic=b"VRINGST\0"), "it is no saved state"),
        (forged(b"{}", layout=2), "its layout has version 2; 1 is known"),
        (forged(b"{}", length=(1 << 30) + 1), "is said to have 1073741825 bytes"),
        (forged(b"{}", checksum=5), "the checksum does not fit"),
        (forged(b"{"), "the body is not JSON"),
        (forged(b"\xff\xff"), "the body is not JSON"),
        (forged(b"[" * 100_000), "the body is not JSON"),
        (forged(b'{"kind": NaN}'), "NaN is no number"),
        (forged(b'{"kind": 1' + b"0" * 5000 + b"}"), "the body is not JSON"),
        (forged(b'{"kind": 1, "kind": 1}'), "a name comes twice"),
        (forged([]), "the body is not an object"),
        (forged({}), "it is the state of None, not of 'outer'"),
        (forged(fields() | {"kind": "inner"}), "it is the state of 'inner', not of 'outer'"),
        (forged(fields() | {"version": True}), "lacks a version or a state"),
        (forged(fields() | {"state": []}), "lacks a version or a state"),
        (forged(fields() | {"version": 2}), "has version 2; versions 1 to 1 are known"),
        (forged(fields() | {"version": 0}), "has version 0; versions 1 to 1 are known"),
        (forged(fields(number="3")), "outer.number: a string instead of a whole number"),
        (forged(fields(number=1.5)), "outer.number: a fraction instead of a whole number"),
        (forged(fields(number=True)), "outer.number: true or false instead of a whole number"),
        (forged(fields(number=-1)), "outer: number -1 is below 0"),
        (forged(fields(on=1)), "outer.on: a whole number instead of true or false"),
        (forged(fields(more=1)), "outer: 'more' not known"),
        (forged(fields(inner={})), "outer.inner: an object instead of an array"),
        (forged(fields(inner=[5])), "outer.inner[0]: a whole number instead of an object"),
        (forged(fields(inner=[{}])), "outer.inner[0]: colour, data, flags, pair missing"),
        (forged(inner(data="*")), "outer.inner[0].data: not base64"),
        (forged(inner(data="é")), "outer.inner[0].data: not base64"),
        (forged(inner(data=None)), "outer.inner[0].data: null instead of bytes in base64"),
        (forged(inner(colour="green")), "outer.inner[0].colour: 'green' is no Colour"),
        (forged(inner(colour=["red"])), "outer.inner[0].colour: an array instead of a Colour"),
        (forged(inner(flags=False)), "outer.inner[0].flags: true or false instead of a Flags"),
        (forged(inner(pair=[1])), "outer.inner[0].pair: 1 values instead of 2"),
        (forged(inner(pair=[1, None])), "outer.inner[0].pair[1]: null instead of a string"),
        (forged(fields(by_index=[])), "outer.by_index: an array instead of an object"),
        (forged(fields(by_index={"x": INNER_FIELDS})), "the key 'x' is no number"),
        (forged(fields(by_index={"01": INNER_FIELDS})), "the key '01' is no number"),
        (forged(fields(by_index={"٣": INNER_FIELDS})), "the key '٣' is no number"),
        (forged(fields(by_index={"9" * 5000: INNER_FIELDS})), "is no number"),
        (forged(fields(by_name={"k": ["x"]})), "outer.by_name[k][0]: a string instead of"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(data, why):
    with pytest.raises(StateError) as caught:
        FORMAT.unpack(data)
    assert why in str(caught.value)


@given(st.data())
def test_no_change_of_a_byte_passes(data):
    saved = bytearray(FORMAT.pack(EXAMPLE))
    saved[data.draw(st.integers(0, len(saved) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(StateError):
        FORMAT.unpack(saved)


@dataclasses.dataclass
class Newer:
    size: tuple[int, int]


def test_every_older_version_is_read():
    """Version 1 had a width, version 2 a width and a height, version 3 has a size."""

    def from_2(older):
        return {"size": [older.pop("width"), older.pop("height")], **older}

    newest = StateFormat("window", 3, Newer, {1: lambda older: {**older, "height": 25}, 2: from_2})
    for version, state in [
        (1, {"width": 80}),
        (2, {"width": 80, "height": 25}),
        (3, {"size": [80, 25]}),
    ]:
        saved = forged({"kind": "window", "version": version, "state": state})
        assert newest.unpack(saved) == Newer((80, 25))
    with pytest.raises(StateError, match="window: 'depth' not known"):
        newest.unpack(forged({"kind": "window", "version": 1, "state": {"width": 1, "depth": 2}}))


def test_an_upgrade_that_lacks_what_it_needs_is_an_error_of_the_state():
    newest = StateFormat("window", 2, Newer, {1: lambda older: {"size": [older["width"], 0]}})
    with pytest.raises(StateError, match=r"version 1.*'width'"):
        newest.unpack(forged({"kind": "window", "version": 1, "state": {}}))


def test_state_is_plain():
    @dataclasses.dataclass
    class Odd:
        value: object

    with pytest.raises(TypeError, match="object cannot be part of a state"):
        StateFormat("odd", 1, Odd).pack(Odd(object()))


@dataclasses.dataclass(frozen=True)
class Place:
    at: int
    name: str | None


@dataclasses.dataclass
class Part:
    place: Place
    pair: tuple[int, bool]
    flags: Flags


@dataclasses.dataclass
class Parts:
    parts: list[Part]
    loose: list[int]


PARTS = StateFormat("parts", 1, Parts)
PLACES = st.builds(Place, st.integers(0, 3), st.none() | st.sampled_from(["", "a"]))
PART = st.builds(
    Part, PLACES, st.tuples(st.integers(0, 2), st.booleans()), st.sampled_from([*Flags, Flags(0)])
)
CHANGE = st.tuples(st.integers(0, 3), st.sampled_from(["place", "pair", "flags"]), PART)


@given(st.lists(PART, min_size=4, max_size=4), st.lists(CHANGE, max_size=9))
def test_a_packer_sees_every_change(parts, changes):
    state = Parts(parts, [0])
    packer = Packer(PARTS)
    for index, name, part in changes:
        assert PARTS.unpack(packer.pack(state)) == state
        setattr(state.parts[index], name, getattr(part, name))
        state.loose[0] += 1
        assert packer.pack(state) == PARTS.pack(state)
        state.parts[index] = part  # another object, perhaps where one was before
        assert packer.pack(state) == PARTS.pack(state)
    assert PARTS.unpack(packer.pack(state)) == state
