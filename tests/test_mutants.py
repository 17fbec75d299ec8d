"""``scripts/mutants.py`` breaks what it says, and tells which breakages the tests notice."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "mutants.py"

MODULE = '''\
"""A module."""


def least(values, seen):
    if not values:
        raise ValueError("nothing")
    seen.append(len(values))
    return min(values)
'''
TESTS = """\
import pytest
from tiny import least


def test_the_least():
    assert least([2, 1], []) == 1


def test_nothing():
    with pytest.raises(ValueError, match="nothing"):
        least([], [])
"""


@pytest.fixture
def mutants(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutants", module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(mutants: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of one module, one of whose two effects its tests look at."""
    root = tmp_path / "tree"
    for path, text in (("python/tiny.py", MODULE), ("tests/test_tiny.py", TESTS)):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(mutants, "ROOT", root)
    monkeypatch.setattr(mutants, "PACKAGE", "python")
    monkeypatch.setattr(mutants, "ROOMS", {"": ["tests"]})
    return root


def run(mutants: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mutants.py", "--jobs", "1", *options])
    status = mutants.main()
    assert isinstance(status, int)
    return status


def test_what_no_test_notices_is_told(
    mutants: ModuleType,
    tree: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(mutants, monkeypatch) == 0
    said = capsys.readouterr().out
    dropped = "python/tiny.py:7: call dropped: 'seen.append(len(values))' -> 'pass'"
    assert [line for line in said.splitlines() if line.startswith("python/")] == [dropped]
    assert "2 mutants of 1 files, seed 1" in said
    assert "all: 1 of 2 killed (50 %)" in said
    assert (tree / "python/tiny.py").read_text() == MODULE


def test_tests_that_fail_by_themselves_tell_nothing(
    mutants: ModuleType,
    tree: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tree / "tests/test_tiny.py").write_text(TESTS.replace("== 1", "== 2"))
    assert run(mutants, monkeypatch) == 1
    assert "fail without a mutant" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "broken"),
    [
        ("if a:\n    return\n", ["if False:\n    return\n"]),
        ("if a:\n    b = 1\n", ["if (not (a)):\n    b = 1\n"]),
        ("c = a < b\n", ["c = (a) <= (b)\n"]),
        ("c = fd >= 0\n", ["c = (not (fd >= 0))\n"]),
        ("c = a and b\n", ["c = ((a) or (b))\n"]),
        ("c = a[2:]\n", ["c = a[3:]\n"]),
        ("c = a + 1\n", ["c = a + 2\n"]),
        ("await a.close()\n", ["pass\n"]),
        ("log.info('')\n", []),
        ("assert a < b\n", []),
    ],
)
def test_each_breakage(mutants: ModuleType, tmp_path: Path, source: str, broken: list[str]) -> None:
    body = "    " + source.rstrip("\n").replace("\n", "\n    ") + "\n"
    whole = f"# é\nasync def f():\n{body}".encode()  # places are counted in bytes
    (tmp_path / "a.py").write_bytes(whole)
    found = [
        mutants.apply(whole, mutant).decode().split("\n", 2)[2].replace("\n    ", "\n")[4:]
        for mutant in mutants.mutants_of(tmp_path, "a.py")
    ]
    assert found == broken


def test_the_tests_of_a_module_come_first(mutants: ModuleType, tmp_path: Path) -> None:
    for name in ("a/test_client.py", "a/test_router.py", "a/test_router_ends.py", "test_b.py"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    tests = mutants.tests_in(tmp_path, ["a", "test_*.py", "a/test_client.py"])
    names = [test.name for test in mutants.nearest_first(tests, "python/x/router.py")]
    assert names == ["test_router.py", "test_router_ends.py", "test_client.py", "test_b.py"]


def test_every_room_is_there_and_has_tests(mutants: ModuleType) -> None:
    for room, tests in mutants.ROOMS.items():
        places = mutants.ROOT.glob(f"{mutants.PACKAGE}/{room}*")
        assert list(places), room
        for pattern in tests:
            assert mutants.tests_in(mutants.ROOT, [pattern]), pattern
