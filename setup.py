"""The extension modules and how they are compiled; everything else is in pyproject.toml."""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

#: VRING_DEBUG=1 builds with C asserts, Cython's own checks and line tracing.
DEBUG = os.environ.get("VRING_DEBUG", "") not in ("", "0")
#: VRING_SANITIZE=address,undefined builds the extensions for `make sanitize`.
SANITIZE = os.environ.get("VRING_SANITIZE", "")
#: Modules compiled at once.
JOBS = len(os.sched_getaffinity(0))

compile_args = ["-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden"]
link_args: list[str] = []
macros: list[tuple[str, str | None]] = []
if DEBUG:
    compile_args += ["-O1", "-g", "-UNDEBUG"]
    macros += [("CYTHON_TRACE", "1"), ("CYTHON_TRACE_NOGIL", "1")]
else:
    compile_args += ["-O3"]
if os.environ.get("VRING_WERROR", "") not in ("", "0"):
    compile_args += ["-Werror"]
if SANITIZE:
    compile_args += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g"]
    link_args += [f"-fsanitize={SANITIZE}"]
    if SANITIZE == "thread":
        compile_args += ["-Wno-tsan"]

directives = {
    "language_level": "3",
    "auto_pickle": False,
    "autotestdict": False,
    "boundscheck": DEBUG,
    "wraparound": False,
    "initializedcheck": DEBUG,
    "cdivision": True,
    "embedsignature": True,
    "binding": True,
    "linetrace": DEBUG,
}

extensions = [
    Extension(
        f"vring.{source.stem}",
        [source.as_posix()],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
        define_macros=macros,
    )
    for source in sorted(Path("vring").glob("*.pyx"))
]

if not extensions:
    # A wheel without them would be pure Python, install anywhere and import nowhere.
    raise SystemExit("setup.py: vring/ holds no .pyx file: this is not a whole source tree")

modules = cythonize(
    extensions, build_dir="build/cython", compiler_directives=directives, nthreads=JOBS
)
setup(ext_modules=modules, options={"build_ext": {"parallel": JOBS}})
