"""The source distribution, and what setup.py makes of a tree that has lost its sources."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def setup(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments], cwd=directory, capture_output=True, text=True
    )


@pytest.fixture
def tracked() -> list[str]:
    """What git knows and is there."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in listing.stdout.split("\0") if name and (ROOT / name).exists()]


def test_a_source_distribution_holds_all_that_git_knows_and_nothing_else(
    tmp_path: Path, tracked: list[str]
) -> None:
    tree = tmp_path / "tree"
    for name in tracked:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    # What a build leaves behind: it saves time here, and has no place in the distribution.
    if (ROOT / "build" / "cython").exists():
        shutil.copytree(ROOT / "build" / "cython", tree / "build" / "cython")
    for name in ("vring/_core.so", "tests/__pycache__/x.cpython-311.pyc", "dist/x.whl"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).touch()
    result = setup(tree, "-q", "sdist", "--dist-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {member.name.partition("/")[2] for member in tar if member.isfile()}
    made = {name for name in held if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert held - made == set(tracked)


def test_a_tree_without_sources_is_not_built(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / "vring").mkdir()
    (tmp_path / "vring" / "__init__.py").touch()
    result = setup(tmp_path, "-q", "bdist_wheel")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "setup.py: vring/ holds no .pyx file: this is not a whole source tree"
    )
    assert not list(tmp_path.rglob("*.whl"))
