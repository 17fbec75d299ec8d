"""How every fuzz target here is run: coverage-guided with atheris, or at random without it.

python fuzz/TARGET.py --seconds 60
python fuzz/TARGET.py crash-file            # one input again
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

#: Modules whose functions are instrumented.
OURS = ("vring", "__main__")
LENGTH_MAX = 4096


def run(one_input: Callable[[bytes], None], what: str) -> int:
    """The target's command line. ``what`` is fuzzed, in words. Returns the exit status."""
    parser = argparse.ArgumentParser(description=f"Fuzz {what}.")
    parser.add_argument("inputs", nargs="*", type=Path, help="play these instead")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--random", action="store_true", help="not atheris, even if installed")
    args = parser.parse_args()
    for path in args.inputs:
        one_input(path.read_bytes())
    if args.inputs:
        return 0
    try:
        if args.random:
            raise ImportError
        import atheris
    except ImportError:
        count = _at_random(one_input, args.seconds, args.seed)
        print(f"{count} random inputs, seed {args.seed}: {what} held")
        return 0
    for thing in gc.get_objects():  # not the libraries: their coverage guides to nothing of ours
        if isinstance(thing, FunctionType) and str(thing.__module__).startswith(OURS):
            atheris.instrument_func(thing)
    options = [f"-max_total_time={int(args.seconds)}", f"-max_len={LENGTH_MAX}", "-len_control=0"]
    atheris.Setup([sys.argv[0], *options], one_input)
    atheris.Fuzz()
    return 0


def _at_random(one_input: Callable[[bytes], None], seconds: float, seed: int) -> int:
    source = random.Random(seed)
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        data = source.randbytes(source.randrange(LENGTH_MAX))
        try:
            one_input(data)
        except BaseException:
            Path(f"crash-{seed}-{count}").write_bytes(data)
            raise
        count += 1
    return count
