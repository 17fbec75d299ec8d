"""The examples: where they are, and the one way in which tests get at what is in them."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"


def names_of(program: str) -> dict[str, Any]:
    """What an example defines, by name; it does not start as a program.

    They are not imported: ``examples/unicorn`` would take the place of the package of that name
    where this is not installed.

    Args:
        program: its path below ``examples/``.
    """
    return runpy.run_path(str(EXAMPLES / program), run_name="example")
