"""A guest that really runs: Debian testing's QEMU and kernel from QEMU_ROOT, with a busybox shell.

The root is used in place: its own dynamic linker starts its QEMU, so that nothing has to be
mounted and nobody has to be root. The guest's console is a shell that runs one command at a time.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import re
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(os.environ.get("QEMU_ROOT", "/var/cache/vring/qemu-root"))

_LIBRARIES = ROOT / "usr/lib/x86_64-linux-gnu"

#: Says where a command's output ends in the console's stream, and how the command ended.
_PROMPT = re.compile(rb"@@(\d+)@@\r?\n")

_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mkdir -p /proc /sys /tmp
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
stty -F /dev/ttyS0 -echo -onlcr
exec setsid sh -c 'exec sh -c "
  printf \\"@@0@@\\n\\"
  while read -r line; do eval \\"\\$line\\"; printf \\"@@%d@@\\n\\" \\$?; done
" < /dev/ttyS0 > /dev/ttyS0 2>&1'
"""


def kernel() -> Path:
    """The root's kernel image."""
    return max((ROOT / "boot").glob("vmlinuz-*"))


def initramfs(files: dict[str, bytes] | None = None) -> bytes:
    """A compressed archive (cpio, "newc") with busybox, the init script and ``files``."""
    entries: list[tuple[str, int, bytes]] = [
        *((name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "dev", "proc", "sys", "tmp")),
        ("bin/busybox", stat.S_IFREG | 0o755, (ROOT / "bin/busybox").read_bytes()),
        ("init", stat.S_IFREG | 0o755, _INIT.encode()),
        *((name, stat.S_IFREG | 0o755, data) for name, data in (files or {}).items()),
    ]
    return gzip.compress(b"".join(_cpio(entries)), 1)


def _cpio(entries: Iterable[tuple[str, int, bytes]]) -> Iterable[bytes]:
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        path = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + path
        yield head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)


class CommandError(AssertionError):
    """A command in the guest ended with another status than 0."""


class QemuMachine:
    """One virtual machine from its start to its end.

    Args:
        directory: where its files go.
        devices: QEMU's further options.
        memory_mib: RAM, in a memfd that backends may map.
    """

    def __init__(
        self,
        directory: Path,
        devices: Sequence[str] = (),
        *,
        memory_mib: int = 256,
        shared: bool = True,
    ) -> None:
        self._directory = directory
        self._devices = tuple(devices)
        self._memory_mib = memory_mib
        self._shared = shared
        self._process: asyncio.subprocess.Process | None = None
        self._unread = b""
        self.log = b""

    async def start(self, timeout: float = 60) -> None:
        """Boot, and return when the guest takes commands."""
        initrd = self._directory / "initrd.gz"
        if not initrd.exists():
            initrd.write_bytes(initramfs())
        self._process = await asyncio.create_subprocess_exec(
            *self.command_line(initrd),
            env=os.environ | {"QEMU_MODULE_DIR": str(_LIBRARIES / "qemu")},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        async with asyncio.timeout(timeout):
            await self._until_prompt()

    def command_line(self, initrd: Path) -> list[str]:
        """QEMU and its options."""
        linker = ROOT / "lib64/ld-linux-x86-64.so.2"
        size = f"{self._memory_mib}M"
        share = "on" if self._shared else "off"
        kind = "memory-backend-memfd" if self._shared else "memory-backend-ram"
        # fmt: off
        return [
            str(linker), "--library-path", f"{_LIBRARIES}:{_LIBRARIES}/pulseaudio",
            str(ROOT / "usr/bin/qemu-system-x86_64"),
            "-L", str(ROOT / "usr/share/qemu"), "-L", str(ROOT / "usr/share/seabios"),
            "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio",
            "-accel", "tcg", "-cpu", "max", "-m", size, "-M", "q35,memory-backend=mem",
            "-object", f"{kind},id=mem,size={size},share={share}",
            "-qmp", f"unix:{self.qmp_path},server=on,wait=off",
            "-kernel", str(kernel()), "-initrd", str(initrd),
            "-append", "console=ttyS0 quiet loglevel=4 panic=-1 rdinit=/init",
            "-no-reboot",
            *self._devices,
        ]
        # fmt: on

    @property
    def qmp_path(self) -> Path:
        """The socket of QEMU's own control protocol."""
        return self._directory / "qmp.sock"

    async def run(self, command: str, timeout: float = 30) -> str:
        """Run one line of shell in the guest; its output. Raises CommandError."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(command.encode() + b"\n")
        async with asyncio.timeout(timeout):
            output, status = await self._until_prompt()
        if status:
            raise CommandError(f"{command}: status {status}\n{output}")
        return output

    async def stop(self) -> None:
        """Kill it. Safe to call twice."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()

    async def _until_prompt(self) -> tuple[str, int]:
        assert self._process is not None
        assert self._process.stdout is not None
        while (found := _PROMPT.search(self._unread)) is None:
            data = await self._process.stdout.read(4096)
            assert data, f"QEMU ended: {self.log.decode(errors='replace')[-2000:]}"
            self._unread += data
            self.log += data
        output = self._unread[: found.start()].decode(errors="replace")
        self._unread = self._unread[found.end() :]
        return output.replace("\r\n", "\n"), int(found[1])
