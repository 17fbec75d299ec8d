"""Break the code in small ways, and tell which breakages no test notices.

    .venv/bin/python scripts/mutants.py --seconds 600 --seed 1 [PATH...]

A mutant is one change of one place: a check removed, a comparison swapped, a bound moved by one, a
call dropped, a condition negated. It is made in a copy of the tree, and the tests of its room run
there, those with the module's name first. One that they all pass with has survived: a test is
missing, or nothing depends on what was changed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[1]
PACKAGE = "python/vring_serial"

#: Which tests (patterns) notice what happens to a module; the first prefix that fits counts.
ROOMS = {
    "device/console": ["tests/device/console"],
    "device/registers": ["tests/device/registers", "tests/transport/inprocess"],
    "device/pci": ["tests/device/pci", "tests/transport/inprocess"],
    "device": ["tests/device/test_*.py", "tests/device/console"],
    "transport/vhost_user": ["tests/transport/vhost_user"],
    "transport/vfio_user": ["tests/transport/vfio_user"],
    "transport/inprocess": ["tests/transport/inprocess"],
    "transport": ["tests/transport/test_*.py", "tests/transport/vhost_user"],
    "agent": ["tests/agent"],
    "proto/agent": ["tests/proto/test_agent*.py", "tests/agent/test_host.py"],
    "proto": ["tests/proto/test_[cv]*.py", "tests/transport/vfio_user/test_malformed.py"],
    "chardev/hangup": ["tests/chardev/test_[hs]*.py"],
    "chardev/socket": ["tests/chardev/test_[hs]*.py"],
    # Without those that dial for a minute.
    "chardev": ["tests/chardev/test_[bdefpr]*.py", "tests/chardev/test_stdio.py"],
}

#: What the copied tree does without.
LEFT_OUT = (".git", ".venv", "build", "dist", "__pycache__", ".*_cache", ".hypothesis")

SWAPPED: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.In: "not in",
    ast.NotIn: "in",
    ast.Is: "is not",
    ast.IsNot: "is",
}
#: Calls whose absence only a reader of the log notices, or nobody.
QUIET = ("log.", "_log.", "_said.", "super(", "warnings.")


@dataclass(frozen=True, slots=True)
class Mutant:
    """``new`` in place of ``old``, the bytes ``start`` to ``end`` of a file."""

    path: str
    line: int
    what: str
    start: int
    end: int
    old: str
    new: str


class Finder(ast.NodeVisitor):
    """Collects the mutants of one file."""

    def __init__(self, path: str, source: bytes) -> None:
        self.found: list[Mutant] = []
        self._path = path
        self._source = source
        self._lines = [0]
        for line in source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))

    def _span(self, node: ast.AST) -> tuple[int, int]:
        start = self._lines[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        end = self._lines[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
        return start, end

    def _text(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return self._source[start:end].decode()

    def _add(self, node: ast.AST, what: str, new: str) -> None:
        start, end = self._span(node)
        line: int = node.lineno  # type: ignore[attr-defined]
        self.found.append(Mutant(self._path, line, what, start, end, self._text(node), new))

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        if node.name in ("__repr__", "__str__"):
            return
        for statement in node.body:  # neither annotations nor decorators
            self.visit(statement)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815 - the name that ast asks for

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assert(self, node: ast.Assert) -> None:
        """Tells readers and type checkers."""

    def visit_If(self, node: ast.If) -> None:
        if self._text(node.test) == "TYPE_CHECKING":
            return
        leaves = isinstance(node.body[-1], (ast.Raise, ast.Return, ast.Continue, ast.Break))
        if leaves and not node.orelse:
            self._add(node.test, "check removed", "False")
        else:
            self._negate(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._negate(node.test)
        self.generic_visit(node)

    def _negate(self, test: ast.expr) -> None:
        self._add(test, "condition negated", f"(not ({self._text(test)}))")

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = " or " if isinstance(node.op, ast.And) else " and "
        parts = [f"({self._text(value)})" for value in node.values]
        if not any(isinstance(value, ast.NamedExpr) for value in node.values):
            self._add(node, "and for or", f"({other.join(parts)})")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1:
            left, right = node.left, node.comparators[0]
            operator = SWAPPED[type(node.ops[0])]
            if self._text(left).endswith("fd") and self._text(right) == "0":
                # Whether there is a descriptor; nobody has descriptor 0.
                self._negate(node)
                return
            text = f"({self._text(left)}) {operator} ({self._text(right)})"
            self._add(node, "comparison swapped", text)
        for value in (node.left, *node.comparators):
            self._move(value)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.op, (ast.Add, ast.Sub)):
            self._move(node.right)
        self.generic_visit(node)

    def visit_Slice(self, node: ast.Slice) -> None:
        for value in (node.lower, node.upper):
            if value is not None:
                self._move(value)
        self.generic_visit(node)

    def _move(self, value: ast.expr) -> None:
        if isinstance(value, ast.Constant) and type(value.value) is int:
            self._add(value, "bound moved by one", str(value.value + 1))

    def visit_Expr(self, node: ast.Expr) -> None:
        call = node.value.value if isinstance(node.value, ast.Await) else node.value
        if isinstance(call, ast.Call) and not any(
            word in self._text(call.func) + "(" for word in QUIET
        ):
            self._add(node, "call dropped", "pass")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if not self._is_quiet(node):
            self.generic_visit(node)

    def _is_quiet(self, call: ast.Call) -> bool:
        name = self._text(call.func) + "("
        return any(word in name for word in QUIET)


def mutants_of(root: Path, path: str) -> list[Mutant]:
    """All mutants of a file that are still Python."""
    source = (root / path).read_bytes()
    finder = Finder(path, source)
    finder.visit(ast.parse(source))
    return [mutant for mutant in finder.found if _parses(apply(source, mutant))]


def apply(source: bytes, mutant: Mutant) -> bytes:
    """Return the source with the change in it."""
    return source[: mutant.start] + mutant.new.encode() + source[mutant.end :]


def _parses(source: bytes) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def room_of(path: str) -> str:
    """Return the room that a file is in."""
    inside = path.removeprefix(PACKAGE + "/")
    return next(room for room in ROOMS if inside.startswith(room))


def tests_in(root: Path, patterns: list[str]) -> list[Path]:
    """Return the files of tests that patterns of files and directories name, in their order."""
    places = (place for pattern in patterns for place in sorted(root.glob(pattern)))
    found = (place.rglob("test_*.py") if place.is_dir() else [place] for place in places)
    return list(dict.fromkeys(file for files in found for file in sorted(files)))


def nearest_first(tests: list[Path], module: str) -> list[Path]:
    """Return the tests with those first whose names say that they are of this module."""
    name = Path(module).stem

    def is_far(test: Path) -> bool:
        of = test.stem.removeprefix("test_")
        return not name or not (of.startswith(name) or name.startswith(of))

    return sorted(tests, key=is_far)


class Tree:
    """A copy of the tree, in which one mutant at a time is made.

    Attributes:
        root: where it is.
        said: gets what the tests say.
    """

    def __init__(self, directory: Path) -> None:
        self.root = directory
        self.said = directory.with_suffix(".said")
        left_out = shutil.ignore_patterns(*LEFT_OUT)
        shutil.copytree(ROOT, directory, symlinks=True, ignore=left_out)

    def passes(self, tests: list[str], timeout: float, near: str = "") -> bool | None:
        """Run these tests here, those of the module ``near`` first; None if they take too long."""
        paths = f"{self.root}/python:{self.root}"
        files = [str(file) for file in nearest_first(tests_in(self.root, tests), near)]
        with self.said.open("wb") as output:
            process = subprocess.Popen(
                (sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files),
                cwd=self.root,
                env={**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            return process.wait(timeout) == 0
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):  # also what the tests left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def survives(self, mutant: Mutant, tests: list[str], timeout: float) -> bool:
        """Make a mutant, run the tests, unmake it; True if they all passed."""
        file = self.root / mutant.path
        source = file.read_bytes()
        file.write_bytes(apply(source, mutant))
        try:
            return self.passes(tests, timeout, mutant.path) is True
        finally:
            file.write_bytes(source)


@dataclass
class Count:
    """Mutants of one room."""

    made: int = 0
    survived: int = 0


def files_of(paths: list[str]) -> Iterator[str]:
    """Yield the modules in the rooms, or below the paths given."""
    for room in ROOMS if not paths else [""]:
        for top in paths or [f"{PACKAGE}/{room}"]:
            place = ROOT / top
            found = [place] if place.is_file() else sorted(place.rglob("*.py"))
            for file in found:
                yield str(file.relative_to(ROOT))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("paths", nargs="*", help="modules or directories; all rooms by default")
    parser.add_argument("--seconds", type=float, default=600.0, help="when the last begins")
    parser.add_argument("--seed", type=int, default=1, help="which mutants are chosen")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trees at once")
    options = parser.parse_args()

    files = sorted(set(files_of(options.paths)))
    every = [mutant for file in files for mutant in mutants_of(ROOT, file)]
    random.Random(options.seed).shuffle(every)
    print(f"{len(every)} mutants of {len(files)} files, seed {options.seed}", flush=True)
    counts: dict[str, Count] = {room: Count() for room in ROOMS}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vring-mutants-") as name:
        trees: SimpleQueue[Tree] = SimpleQueue()
        first = Tree(Path(name) / "0")
        limits = {}
        for room in sorted({room_of(mutant.path) for mutant in every}):
            started = time.monotonic()
            if first.passes(ROOMS[room], 600) is not True:
                print("".join(first.said.read_text().splitlines(keepends=True)[-30:]))
                print(f"the tests of {room} fail without a mutant: {' '.join(ROOMS[room])}")
                return 1
            limits[room] = 30 + 2 * (time.monotonic() - started)
            print(f"{room}: tests take {time.monotonic() - started:.0f} s", flush=True)
        trees.put(first)
        for number in range(1, options.jobs):
            trees.put(Tree(Path(name) / str(number)))
        end = time.monotonic() + options.seconds

        def one(mutant: Mutant) -> None:
            if time.monotonic() > end:
                return
            room = room_of(mutant.path)
            tree = trees.get()
            try:
                survived = tree.survives(mutant, ROOMS[room], limits[room])
            finally:
                trees.put(tree)
            counts[room].made += 1
            counts[room].survived += survived
            if survived:
                where = f"{mutant.path}:{mutant.line}"
                print(f"{where}: {mutant.what}: {mutant.old!r} -> {mutant.new!r}")
                sys.stdout.flush()

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(one, every))
    for room, count in [*counts.items(), ("all", _sum(counts))]:
        if count.made:
            killed = count.made - count.survived
            rate = 100 * killed / count.made
            print(f"{room}: {killed} of {count.made} killed ({rate:.0f} %)")
    print(f"in {time.monotonic() - begin:.0f} s")
    return 0


def _sum(counts: dict[str, Count]) -> Count:
    values = counts.values()
    return Count(sum(c.made for c in values), sum(c.survived for c in values))


if __name__ == "__main__":
    sys.exit(main())
