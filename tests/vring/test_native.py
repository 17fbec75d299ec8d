"""The C that Cython modules carry, compiled alone: races held where they hurt, other processors."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
VRING = HERE.parents[1] / "vring"
BLOCK = re.compile(r'cdef extern from \*[^\n]*:\n    """\n(.*?)\n    """', re.DOTALL)


def c_of(*names: str) -> str:
    """The verbatim C of modules of vring/."""
    return "\n".join(block for name in names for block in BLOCK.findall((VRING / name).read_text()))


def test_whoever_reads_zeros_finds_the_loss_counted(tmp_path: Path) -> None:
    """Also while another thread that faulted on the same mapping has not come to count it."""
    (tmp_path / "guard.h").write_text(c_of("_guard.pxd", "_guard.pyx"))
    program = tmp_path / "race"
    subprocess.run(
        [
            "cc",
            "-std=gnu11",
            "-O2",
            "-pthread",
            "-I",
            tmp_path,
            HERE / "guard_race.c",
            "-o",
            program,
        ],
        check=True,
    )
    out = subprocess.run([program], check=True, timeout=60, capture_output=True, text=True)
    assert out.stdout == "read 0, losses 1\n"


RISCV = "riscv64-linux-gnu-gcc"
#: Headers of that processor need not be there for this.
ENDIAN = "#define __BYTE_ORDER 1234\n#define __BIG_ENDIAN 4321\n" + "".join(
    f"#define le{n}toh(x) (x)\n#define htole{n}(x) (x)\n" for n in (16, 32, 64)
)
STRING = """
void *memcpy(void *, const void *, __SIZE_TYPE__);
void *memmove(void *, const void *, __SIZE_TYPE__);
"""
READ = "vr_entry d = vr_read_desc(p); vr_entry e = vr_read_packed(p); return d.addr + e.id;"
WRITE = "vr_write_desc(p, 1, 2, 3, 4); return 0;"
USED = "vr_write_used(p, 1, 2); return 0;"
BYTES = {"lb", "lbu", "lh", "lhu", "sb", "sh"}


@pytest.mark.skipif(not shutil.which(RISCV), reason=f"no {RISCV}: make peers")
def test_entries_of_rings_are_whole_words_on_riscv(tmp_path: Path) -> None:
    """An entry that is read or written byte by byte can be seen in part by the other side."""
    (tmp_path / "endian.h").write_text(ENDIAN)
    (tmp_path / "string.h").write_text(STRING)
    source = tmp_path / "entry.c"

    def instructions(body: str) -> set[str]:
        source.write_text(f"{c_of('_wire.pxd')}\nuint64_t entry(void *p) {{ {body} }}\n")
        options = ["-std=gnu11", "-ffreestanding", "-O2", "-S", "-I", tmp_path]
        command = [RISCV, *options, source, "-o", "-"]
        out = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        return set(re.findall(r"^\t([a-z0-9]+)\t", out.stdout, re.MULTILINE))

    # Nobody knows where a descriptor lies until it is there: both ways are in the code.
    assert {"ld", "lbu"} <= instructions(READ)
    assert {"sd", "sb"} <= instructions(WRITE)
    assert not BYTES & instructions(USED)
    for body in (READ, WRITE):
        assert not BYTES & instructions(f"p = __builtin_assume_aligned(p, 16); {body}")
