"""A real Linux kernel as the guest: User-Mode Linux on this machine's own files, without KVM.

Debian's package `user-mode-linux` brings the kernel and its virtio_console module, `busybox-static`
the guest's commands. The guest's root is the host's, read-only, through hostfs; one directory is
shared at /mnt. Its console is a shell that this module feeds one command at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import shutil
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vring_serial.errors import DependencyError, ResourceError
from vring_serial.guest.errors import GuestEndedError, GuestTimeoutError
from vring_serial.lifetime import Starting

log = logging.getLogger(__name__)

#: virtio device type of a console, which `virtio_uml.device=` wants with the socket.
VIRTIO_ID_CONSOLE = 3
#: Longest console output kept for one command; a runaway command is cut there.
MAX_OUTPUT = 16 << 20

INIT = """\
#!{busybox} sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
{busybox} mount -t proc proc /proc
{busybox} mount -t sysfs sysfs /sys
{busybox} mount -t devtmpfs devtmpfs /dev
{busybox} mkdir -p /dev/pts /dev/shm
{busybox} mount -t devpts devpts /dev/pts
{busybox} mount -t hostfs -o {share} none /mnt
{busybox} mount -t tmpfs tmpfs /run
{busybox} mount -t tmpfs tmpfs /tmp
{busybox} stty raw -echo 2>/dev/null
{busybox} insmod {module}
echo "@ready $?"
while read -r number; do
    {busybox} sh /mnt/command.$number </dev/null 2>&1
    echo "
@done $number $?"
done
{busybox} poweroff -f
"""


@dataclass(frozen=True, slots=True)
class UmlParts:
    """Paths of the files that a User-Mode Linux guest is made of.

    Attributes:
        kernel: the User-Mode Linux kernel, an executable.
        busybox: the busybox executable.
        module: the kernel module virtio_console.
    """

    kernel: Path
    busybox: Path
    module: Path


def find_parts() -> UmlParts:
    """Find kernel, console module and busybox. Raises DependencyError naming the packages."""
    kernel = shutil.which("linux.uml")
    modules = sorted(Path("/usr/lib/uml/modules").glob("*/kernel/drivers/char/virtio_console.ko"))
    if kernel is None or not modules:
        raise DependencyError(
            "User-Mode Linux is not installed; Debian's package user-mode-linux brings it "
            "(`make peers` installs all peers)"
        )
    busybox = shutil.which("busybox")
    if busybox is None:
        raise DependencyError(
            "busybox is not installed; Debian's package busybox-static brings it "
            "(`make peers` installs all peers)"
        )
    return UmlParts(Path(kernel), Path(busybox), modules[-1])


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The result of a command in the guest.

    Attributes:
        status: exit status.
        output: text printed to standard output and standard error.
    """

    status: int
    output: str


class UmlGuest(Starting):
    """One running User-Mode Linux.

    Args:
        sockets: vhost-user sockets of console devices; the backends listen already.
        memory_mib: guest RAM in MiB; 128 suffices for the console, 768 for an X server.
    """

    def __init__(self, sockets: Sequence[str | Path], *, memory_mib: int = 128) -> None:
        self._parts = find_parts()
        self._sockets = [Path(s).absolute() for s in sockets]
        self._memory_mib = memory_mib
        self._directory = Path(tempfile.mkdtemp(prefix="vring-uml-"))
        self._process: asyncio.subprocess.Process | None = None
        self._count = 0
        self._lock = asyncio.Lock()

    @property
    def share(self) -> Path:
        """The directory on the host that the guest sees at /mnt."""
        return self._directory

    async def start(self, timeout: float = 60) -> None:
        """Boot to the shell.

        Raises ResourceError with the kernel's last lines if that fails; nothing of it is left then.
        """
        try:
            await self._boot(timeout)
        except BaseException:
            await self.aclose()
            raise

    async def _boot(self, timeout: float) -> None:
        init = self._directory / "init.sh"
        init.write_text(
            INIT.format(
                busybox=self._parts.busybox,
                share=shlex.quote(str(self._directory)),
                module=self._parts.module,
            )
        )
        init.chmod(0o755)
        self._process = await asyncio.create_subprocess_exec(
            self._parts.kernel,
            f"mem={self._memory_mib}M",
            "root=/dev/root",
            "rootfstype=hostfs",
            "rootflags=/",
            "ro",
            f"init={init}",
            "con=null",
            "con0=fd:0,fd:1",
            "quiet",
            "panic=-1",
            f"uml_dir={self._directory}/",
            *(f"virtio_uml.device={path}:{VIRTIO_ID_CONSOLE}" for path in self._sockets),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            async with self._lock, asyncio.timeout(timeout):
                words, output = await self._read_until(b"@ready ")
        except TimeoutError:
            raise GuestTimeoutError(f"the guest kernel did not boot in {timeout:g} s") from None
        if words != ["0"]:
            raise ResourceError(f"the guest could not load virtio_console: {output.strip()}")

    async def run(self, script: str, timeout: float = 60) -> CommandResult:
        """Run a shell script in the guest and wait for it.

        A script that nobody waits for any more runs on, and the next one after it.

        Raises:
            GuestTimeoutError: it did not end within ``timeout`` seconds.
            GuestEndedError: the guest died.
        """
        assert self._process is not None
        assert self._process.stdin is not None
        async with self._lock:
            try:
                async with asyncio.timeout(timeout):
                    self._count += 1
                    (self._directory / f"command.{self._count}").write_text(script)
                    self._process.stdin.write(f"{self._count}\n".encode())
                    await self._process.stdin.drain()
                    words, output = await self._read_until(b"@done ")
                    while words[0] != str(self._count):
                        # Of a script that nobody waits for any more.
                        words, output = await self._read_until(b"@done ")
            except TimeoutError:
                raise GuestTimeoutError(f"a script in the guest took over {timeout:g} s") from None
        log.debug("guest ran %r: %s %s", script, words, output)
        return CommandResult(int(words[1]), output.strip("\r\n"))

    async def _read_until(self, marker: bytes) -> tuple[list[str], str]:
        assert self._process is not None
        assert self._process.stdout is not None
        lines: list[bytes] = []
        size = 0
        while True:
            try:
                line = await self._process.stdout.readline()
            except ValueError:
                continue  # a line beyond the stream's limit; the rest of it follows
            if not line:
                tail = b"".join(lines[-20:]).decode(errors="replace").strip()
                raise GuestEndedError(f"the guest kernel ended: {tail or 'it said nothing'}")
            if line.startswith(marker):
                output = b"".join(lines).decode(errors="replace").replace("\r\n", "\n")
                return line[len(marker) :].decode().split(), output
            if size < MAX_OUTPUT:
                size += len(line)
                lines.append(line)

    async def aclose(self) -> None:
        """End the guest at once (it ignores SIGTERM) and remove its directory."""
        process, self._process = self._process, None
        try:
            if process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                assert process.stdin is not None
                process.stdin.close()
                await self._discard_output(process)
                await process.wait()
        finally:
            await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)

    async def _discard_output(self, process: asyncio.subprocess.Process) -> None:
        """Read what a killed guest had printed: asyncio says that a process ended only after that.

        A kernel whose device went away may crash in a loop of its own messages.
        """
        async with self._lock:  # a script that still waits ends first
            assert process.stdout is not None
            while await process.stdout.read(65536):
                pass
