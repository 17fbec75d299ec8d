"""A guest that really runs: Debian testing's QEMU and kernel from QEMU_ROOT, with a busybox shell.

The root is used in place: its own dynamic linker starts its QEMU, so that nothing has to be
mounted and nobody has to be root. The kernel talks to the first serial port, whose output is a
file; on the second one is a shell that takes one script at a time.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from qemu.qmp import QMPClient

from tests.support.guest_shell import LOOP, GuestShell
from tests.support.processes import end

ROOT = Path(os.environ.get("QEMU_ROOT", "/var/cache/vring/qemu-root"))

_LIBRARIES = ROOT / "usr/lib/x86_64-linux-gnu"

#: QEMU and the options that every machine here has. Emulated also where KVM could be had, so that
#: all machines test and measure the same thing; and without the string instructions that kernels
#: prefer for copying and that emulation takes byte by byte.
QEMU = [
    *(str(ROOT / "lib64/ld-linux-x86-64.so.2"), "--library-path", str(_LIBRARIES)),
    str(ROOT / "usr/bin/qemu-system-x86_64"),
    *("-L", str(ROOT / "usr/share/qemu"), "-L", str(ROOT / "usr/share/seabios")),
    *("-nodefaults", "-no-user-config", "-display", "none"),
    *("-accel", "tcg,thread=multi", "-cpu", "max,-erms,-fsrm,-fzrm,-fsrs"),
]

#: What the kernel is told. Its tests of its own cryptography are a third of an emulated boot.
WORDS = "console=ttyS0 quiet loglevel=4 panic=-1 rdinit=/init cryptomgr.notests"

_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
exec </dev/ttyS1 >/dev/ttyS1 2>&1
"""


def kernel() -> Path:
    """The root's kernel image."""
    return max((ROOT / "boot").glob("vmlinuz-*"))


def modules() -> Path:
    """The directory of the kernel's modules, which are compressed with xz."""
    return ROOT / "usr/lib/modules" / kernel().name.removeprefix("vmlinuz-")


def initramfs(files: Mapping[str, bytes] | None = None) -> bytes:
    """An archive (cpio, "newc") with busybox, the init script and ``files``."""
    entries: list[tuple[str, int, bytes]] = [
        *((name, stat.S_IFDIR | 0o755, b"") for name in _directories(files or {})),
        ("bin/busybox", stat.S_IFREG | 0o755, (ROOT / "bin/busybox").read_bytes()),
        ("init", stat.S_IFREG | 0o755, f"{_INIT}{LOOP}".encode()),
        *((name, stat.S_IFREG | 0o755, data) for name, data in (files or {}).items()),
    ]
    return b"".join(_cpio(entries))


def _directories(files: Iterable[str]) -> list[str]:
    """Directories of the root, each before what is in it."""
    parents = {str(parent) for file in files for parent in PurePosixPath(file).parents}
    return sorted({"bin", "dev", "proc", "sys", "tmp"} | parents - {"."})


def _cpio(entries: Iterable[tuple[str, int, bytes]]) -> Iterable[bytes]:
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        path = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + path
        yield head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


class QemuMachine:
    """One virtual machine from its start to its end.

    Args:
        directory: where its files go; it may be that of an earlier machine that was stopped.
        devices: QEMU's further options.
        memory_mib: RAM, in a memfd that backends may map.
        shared: whether they may.
        cpus: how many.
        files: what the guest finds in its root, by path.
        append: more words for the kernel's command line.
    """

    def __init__(
        self,
        directory: Path,
        devices: Sequence[str] = (),
        *,
        memory_mib: int = 256,
        shared: bool = True,
        cpus: int = 1,
        files: Mapping[str, bytes] | None = None,
        append: str = "",
    ) -> None:
        self._directory = directory
        self._devices = tuple(devices)
        self._memory_mib = memory_mib
        self._shared = shared
        self._cpus = cpus
        self._files = files
        self._append = append
        self._process: asyncio.subprocess.Process | None = None
        self._qmp: QMPClient | None = None
        self._shell: GuestShell | None = None

    async def start(self, timeout: float = 60) -> None:
        """Boot, and return when the guest takes commands."""
        initrd = self._directory / "initrd"
        initrd.write_bytes(initramfs(self._files))
        self._process = await asyncio.create_subprocess_exec(
            *self.command_line(initrd),
            env=os.environ | {"QEMU_MODULE_DIR": str(_LIBRARIES / "qemu")},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._shell = GuestShell(self._process.stdout, self._process.stdin, self._last_words)
        await self._shell.ready(timeout)

    def command_line(self, initrd: Path) -> list[str]:
        """QEMU and its options."""
        size = f"{self._memory_mib}M"
        share = "on" if self._shared else "off"
        kind = "memory-backend-memfd" if self._shared else "memory-backend-ram"
        return [
            *QEMU,
            *("-m", size, "-smp", str(self._cpus), "-M", "q35,memory-backend=mem"),
            *("-object", f"{kind},id=mem,size={size},share={share}"),
            *("-qmp", f"unix:{self.qmp_path},server=on,wait=off"),
            *("-serial", f"file:{self.log_path}", "-serial", "stdio"),
            *(
                "-kernel",
                str(kernel()),
                "-initrd",
                str(initrd),
                "-append",
                f"{WORDS} {self._append}",
            ),
            *self._devices,
        ]

    @property
    def qmp_path(self) -> Path:
        """The socket of QEMU's own control protocol."""
        return self._directory / "qmp.sock"

    @property
    def log_path(self) -> Path:
        """What firmware and kernel say."""
        return self._directory / "console.log"

    @property
    def pid(self) -> int:
        """QEMU's process."""
        assert self._process is not None
        return self._process.pid

    @property
    def shell(self) -> GuestShell:
        """The guest's shell, once the machine was started."""
        assert self._shell is not None
        return self._shell

    async def run(self, script: str, timeout: float = 30) -> str:
        """Run a shell script in the guest; what it printed. Raises CommandError."""
        return await self.shell.run(script, timeout)

    async def reboot(self, timeout: float = 60) -> None:
        """Let the guest reboot itself, and return when it takes commands again."""
        await self.shell.reboot(timeout)

    async def reset(self, timeout: float = 60) -> None:
        """Push the reset button, and return when the guest takes commands again."""
        await self.shell.ready(timeout, after=lambda: self.qmp("system_reset"))

    async def qmp(self, command: str, **arguments: Any) -> Any:
        """A command of QEMU's control protocol; its answer."""
        if self._qmp is None:
            self._qmp = QMPClient()
            self._qmp.logger.disabled = True
            await self._qmp.connect(str(self.qmp_path))
        return await self._qmp.execute(command, arguments)

    async def aclose(self) -> None:
        """Kill it. Safe to call twice."""
        if self._qmp is not None:
            with suppress(Exception):  # it may be gone already, and then it was meant to be
                await self._qmp.disconnect()
            self._qmp = None
        process, self._process = self._process, None
        if process is not None:
            await end(process)

    def _last_words(self) -> str:
        with suppress(OSError):
            return self.log_path.read_bytes()[-2000:].decode(errors="replace")
        return ""
