"""Lines of keys: each is where tomllib, which tells none, has read the key."""

from __future__ import annotations

import tomllib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from vring_serial.config.toml_lines import find_lines

DOCUMENT = '''# first
top = 1
"quoted \\" key" = """
not = "a key"
[nor.a.table] \\""" """""

[a.b]  # comment [x]
c.d = { e = 'x = 1', f = [
    1, "]",
    [ { g = 2 } ],
] }
[[list]]
k = """"ends in quotes"""""
[list.inner]
k = 1979-05-27 07:32:00
[[list]]
"k" = \'\'\'
[raw]
\'\'\'
'''


def test_all_of_the_syntax() -> None:
    tomllib.loads(DOCUMENT)
    assert find_lines(DOCUMENT) == {
        ("top",): 2,
        ('quoted " key',): 3,
        ("a",): 7,
        ("a", "b"): 7,
        ("a", "b", "c"): 8,
        ("a", "b", "c", "d"): 8,
        ("a", "b", "c", "d", "e"): 8,
        ("a", "b", "c", "d", "f"): 8,
        ("a", "b", "c", "d", "f", 0): 9,
        ("a", "b", "c", "d", "f", 1): 9,
        ("a", "b", "c", "d", "f", 2): 10,
        ("a", "b", "c", "d", "f", 2, 0): 10,
        ("a", "b", "c", "d", "f", 2, 0, "g"): 10,
        ("list",): 12,
        ("list", 0): 12,
        ("list", 0, "k"): 13,
        ("list", 0, "inner"): 14,
        ("list", 0, "inner", "k"): 15,
        ("list", 1): 16,
        ("list", 1, "k"): 17,
    }


def paths(value: Any, path: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    """All paths of what tomllib has read."""
    found = {path} if path else set()
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, (dict, list)):
            found |= paths(inner, (*path, key))
        else:
            found.add((*path, key))
    return found


KEYS = st.sampled_from(["a", "b-1", '"x.y"', "'#'", '"\\u00e9"', "a.b", 'a . "c"'])
SCALARS = st.sampled_from(
    [
        *("1", "-0x1f", "1.5e3", "true", "1979-05-27T07:32:00Z", '"a#b\\""', "'\\'", '""', "''"),
        *['"""a\n"" ] = """', "'''\n[x]\n'''", '""""""', "''''''"],
    ]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: "[ " + ", # x\n".join(items) + " ]")
        | st.dictionaries(KEYS, inner, max_size=3).map(
            lambda d: "{ " + ", ".join(f"{k} = {v}" for k, v in d.items()) + " }"
        )
    ),
    max_leaves=6,
)
LINES = st.one_of(
    st.builds(lambda key, value: f"{key} = {value}  # {key}", KEYS, VALUES),
    KEYS.map(lambda key: f"[{key}]"),
    KEYS.map(lambda key: f"[[ {key} ]] # ]"),
    st.just("\t# comment = 1"),
    st.just(""),
)


@given(st.lists(LINES, max_size=12).map("\n".join))
def test_every_key_has_a_line_and_nothing_else_has(text: str) -> None:
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    lines = find_lines(text)
    assert set(lines) == paths(content)
    assert all(1 <= line <= text.count("\n") + 1 for line in lines.values())
