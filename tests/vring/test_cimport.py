"""Another extension cimports vring: everything the package offers to Cython, without the GIL."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vring

FOREIGN = """
# cython: language_level=3
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.stdint cimport uint32_t, uint64_t
from vring cimport GuestMemory, PackedQueue, SplitQueue, VirtQueue, iovec, vr_chain, vr_find

def drain(VirtQueue queue, uint32_t written=0):
    '''(chains, readable bytes, sum of the first bytes, notifications) of all that is available.'''
    cdef vr_chain[64] chains
    cdef iovec[256] segments
    cdef uint32_t[64] lengths
    cdef int n
    cdef uint32_t i, count = 0
    cdef uint64_t total = 0, first = 0, notifications = 0
    for i in range(64):
        lengths[i] = written
    with nogil:
        while True:
            n = queue.pop_c(chains, 64, segments, 256)
            if n <= 0:
                break
            if n > 1:
                queue.unpop_c(1)
                n -= 1
            for i in range(<uint32_t>n):
                total += chains[i].readable_bytes
                first += (<unsigned char*>segments[chains[i].first_segment].iov_base)[0]
            notifications += queue.push_c(chains, lengths, n)
            count += n
        queue.disable_notifications_c()
        if queue.enable_notifications_c():
            count += 1000
    if n < 0:
        queue.raise_broken()
    return count, total, first, notifications

def holds(GuestMemory memory, uint64_t address):
    return vr_find(&memory.map, address) != NULL

def kinds():
    return SplitQueue, PackedQueue

cdef class Giving:
    '''A buffer; giving it out runs code.'''

    cdef object data, code

    def __init__(self, data, code):
        self.data = data
        self.code = code

    def __getbuffer__(self, Py_buffer* view, int flags):
        self.code()
        PyBuffer_FillInfo(view, self, PyByteArray_AS_STRING(self.data), len(self.data), 0, flags)
"""

#: docs/rings.md shows the least there is to it, as a function for C alone.
(EXAMPLE,) = re.findall(
    r"```cython\n(.*?)```",
    (Path(__file__).parents[2] / "docs" / "rings.md").read_text(),
    re.DOTALL,
)
EXAMPLE += """
def call(VirtQueue queue):
    return drain(queue)
"""

USE = """
import sys
sys.path[:0] = [{build!r}, {here!r}]
import example, foreign, vring
from rings import DATA, Ring

assert foreign.kinds() == (vring.SplitQueue, vring.PackedQueue)
for packed in (False, True):
    ring = Ring(size=256, packed=packed)
    ring.data[:] = 3
    for _ in range(120):
        ring.chain(10, 5, writable=1)
    assert foreign.drain(ring.queue, 5)[:3] == (120, 1200, 360)
    heads, lengths = ring.driver.get_used()
    assert set(lengths.tolist()) == {{5}} and len(heads) == 120
    assert foreign.holds(ring.memory, DATA) and not foreign.holds(ring.memory, 1)
    ring.chain(7)
    assert example.call(ring.queue) == 1 and example.call(ring.queue) == 0
    assert len(ring.driver.get_used()[0]) == 1
    ring.driver.add([(1, 1)], [])
    ring.driver.publish()
    try:
        foreign.drain(ring.queue)
    except vring.RingError as error:
        assert "outside guest memory" in str(error)
    else:
        raise AssertionError("not broken")
"""

#: Buffers whose owners complete the chains they are for, or give them back.
HOSTILE = """
import sys
sys.path[:0] = [{build!r}, {here!r}]
import foreign, vring
from rings import DATA, Ring

for packed in (False, True):
    ring = Ring(packed=packed)
    for _ in range(3):
        ring.driver.add([], [(DATA, 8)])
    ring.driver.publish()
    queue = ring.queue
    batch = queue.pop_many(2)
    data = foreign.Giving(bytearray(b"x" * 99), lambda: queue.push_many(batch, 3))
    used, written = batch.scatter(data)
    assert (used, written.tolist()) == (0, []), (used, written)
    chain = queue.pop()
    try:
        chain.write(foreign.Giving(bytearray(b"y" * 8), lambda: queue.push(chain, 2)))
    except vring.LocalMisuseError as error:
        assert "completed" in str(error)
    else:
        raise AssertionError("written")
    assert ring.driver.get_used()[1].tolist() == [3, 3, 2]
    assert not ring.data.any(), "written into buffers that are the driver's again"

    ring = Ring(packed=packed)
    queue = ring.queue
    for _ in range(2):
        ring.chain(1000)
    batch = queue.pop_many(1)
    into = bytearray(1000)
    assert batch.gather_into(foreign.Giving(into, lambda: queue.unpop(batch))) == 0
"""


def test_a_foreign_extension(tmp_path: Path) -> None:
    pytest.importorskip("Cython")
    (tmp_path / "foreign.pyx").write_text(FOREIGN)
    (tmp_path / "example.pyx").write_text(EXAMPLE)
    (tmp_path / "setup.py").write_text(
        "from Cython.Build import cythonize\n"
        "from setuptools import setup\n"
        f"setup(ext_modules=cythonize('*.pyx', include_path=[{vring.get_include()!r}]))\n"
    )
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "CFLAGS": "-O0"},
    )  # fmt: skip
    assert build.returncode == 0, build.stdout + build.stderr
    for use in (USE, HOSTILE):
        script = use.format(build=str(tmp_path), here=str(Path(__file__).parents[1] / "support"))
        subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
