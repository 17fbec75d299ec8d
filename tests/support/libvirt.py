"""A real libvirtd, and the guest that it runs, in Debian testing's root: QEMU_ROOT.

libvirtd is a system's daemon with fixed paths, and so it has a system to itself: the root under an
overlay, with mounts, processes and network of its own, all of which end with the one process that
holds them. Nobody else sees its files, and the root stays as it was. This machine's files are in it
too, at /host, where the hook's ``vring`` runs, with the users and the /run of libvirtd's system.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from lxml import etree

from tests.support.bench import Stream, hang_up
from tests.support.examples import EXAMPLES
from tests.support.guest_shell import GuestShell
from tests.support.processes import end
from tests.support.qemu_machine import ROOT, WORDS, initramfs, kernel
from tests.support.waiting import until

#: The domain, the channel that libvirt itself talks to, and the one that moves to vring.
NAME = "vm"
AGENT = "org.qemu.guest_agent.0"
DATA = "org.example.data"
#: Where vring's sockets are.
SOCKETS = f"/run/vring/{NAME}"
#: As docs/libvirt.md has them.
CONVERT = "virsh dumpxml --inactive vm | vring libvirt convert > new.xml && virsh define new.xml"
REVERT = (
    "virsh dumpxml --inactive vm | vring libvirt convert --revert > old.xml && virsh define old.xml"
)

#: Makes the system of its arguments, the root and a directory for it; says its number here, and
#: lives until nobody holds its input. Its last program is what orphans of the system end in: bash
#: waits for them, as it must, since libvirtd looks whether a QEMU is still there. No cgroup is to
#: be seen, or libvirtd would use it, and there is no /dev/kvm: all machines test the same thing.
_SYSTEM = """\
set -eu
lower=$1 dir=$2
read -r pid _ </proc/self/stat
mount -t tmpfs -o mode=755 scratch "$dir"
mkdir -p "$dir/upper" "$dir/work" "$dir/root" "$dir/host" "$dir/etc/libvirt"
cp "$lower/etc/passwd" "$lower/etc/group" "$dir/etc"
mount --rbind / "$dir/host"
root=$dir/root
mount -t overlay -o "lowerdir=$lower,upperdir=$dir/upper,workdir=$dir/work" overlay "$root"
mount -t proc proc "$root/proc"
mount --bind /sys "$root/sys"
mount -t devpts -o newinstance,ptmxmode=666 devpts "$root/dev/pts"
ln -sf pts/ptmx "$root/dev/ptmx"
mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
mount -t tmpfs -o mode=755 run "$root/run"
mkdir "$root/host"
mount --move "$dir/host" "$root/host"
mount -t proc proc "$root/host/proc"
! mountpoint -q "$root/host/sys" || umount --recursive "$root/host/sys"
mount --bind /sys "$root/host/sys"
mount --rbind "$root/dev" "$root/host/dev"
mount --bind "$root/var/log" "$root/host/var/log"
mount --bind "$root/run" "$root/host/run"
mount -t overlay -o "lowerdir=$dir/etc:/etc" etc "$root/host/etc"
mount --bind "$root/etc/libvirt" "$root/host/etc/libvirt"
chroot "$root" ip link set lo up
exec chroot "$root" bash -c 'echo "$0"; while read -r _; do :; done' "$pid"
"""

#: What a system without systemd, cgroups and security modules needs.
_QEMU_CONF = """\
namespaces = []
cgroup_controllers = []
security_driver = "none"
stdio_handler = "file"
"""

_VRING = f"""\
#!/bin/sh
exec chroot /host {shlex.quote(sys.executable)} -m vring_serial "$@"
"""

#: What qemu-ga runs when it is asked to end the guest: there is no init that would do it.
_SHUTDOWN = """\
#!/bin/sh
case "$*" in
*-r*) reboot -f ;;
*) poweroff -f ;;
esac
"""

_INITRD = "/var/lib/libvirt/images/initrd"
_SHELL = "/run/guest-shell.sock"
_CONSOLE_LOG = "/var/log/libvirt/qemu/console.log"


def domain(more: str = "") -> str:
    """A domain as operators have it, but for its serial ports, which are the tests' own.

    It has a console, the guest agent's channel, and a channel with a name; ``more`` at its end.
    """
    return f"""\
<domain type='qemu'>
  <name>{NAME}</name>
  <memory unit='MiB'>256</memory>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>/boot/{kernel().name}</kernel>
    <initrd>{_INITRD}</initrd>
    <cmdline>{WORDS} reboot=t</cmdline>
  </os>
  <features>
    <acpi/>
  </features>
  <cpu mode='maximum'>
    <feature policy='disable' name='erms'/>
    <feature policy='disable' name='fsrm'/>
    <feature policy='disable' name='fzrm'/>
    <feature policy='disable' name='fsrs'/>
  </cpu>
  <devices>
    <serial type='file'>
      <source path='{_CONSOLE_LOG}'/>
      <target port='0'/>
    </serial>
    <serial type='unix'>
      <source mode='connect' path='{_SHELL}'/>
      <target port='1'/>
    </serial>
    <console type='pty'>
      <target type='virtio' port='1'/>
    </console>
    <channel type='unix'>
      <target type='virtio' name='{AGENT}'/>
    </channel>
    <channel type='unix'>
      <target type='virtio' name='{DATA}'/>
    </channel>
  </devices>
  {more}
</domain>
"""


def _guest_agent() -> dict[str, bytes]:
    """The root's qemu-ga for the guest, with its loader and libraries."""
    libraries = ROOT / "usr/lib/x86_64-linux-gnu"
    loader = ROOT / "lib64/ld-linux-x86-64.so.2"
    agent = ROOT / "usr/sbin/qemu-ga"
    listed = subprocess.run(
        [loader, "--library-path", libraries, "--list", agent],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.findall(r"=> (\S+/(\S+)) ", listed.stdout)
    return {
        "lib64/ld-linux-x86-64.so.2": loader.read_bytes(),
        "usr/sbin/qemu-ga": agent.read_bytes(),
        **{f"usr/lib/x86_64-linux-gnu/{name}": Path(path).read_bytes() for path, name in found},
        "sbin/shutdown": _SHUTDOWN.encode(),
    }


#: Has qemu-ga answer on its port, and sends back whatever comes on the other one.
_SERVICES = f"""\
node() {{
    until grep -lx $1 /sys/class/virtio-ports/*/name; do sleep 0.05; done 2>/dev/null |
        sed 's,/name$,,; s,.*/,/dev/,'
}}
qemu-ga -d -m virtio-serial -p $(node {AGENT}) -t /tmp -f /tmp/qemu-ga.pid
exec 3<>$(node {DATA})
while sleep 0.05; do cat <&3 >&3; done 2>/dev/null &
"""


class CommandFailedError(AssertionError):
    """A command of an operator's failed."""


class LibvirtHost:
    """A system with libvirtd, virsh and vring's hook; ``start`` and ``aclose``.

    Attributes:
        shell: the guest's, once :meth:`boot` has returned.

    Args:
        directory: an empty one, on which the system's files are mounted.
    """

    shell: GuestShell

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._system: asyncio.subprocess.Process | None = None
        self._pid = 0
        self._server: asyncio.Server | None = None
        self._connected: asyncio.Queue[Stream] = asyncio.Queue()
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> None:
        """Make the system, and start libvirtd in it."""
        self._system = await asyncio.create_subprocess_exec(
            *("unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--propagation=private"),
            *("--fork", "--kill-child", "bash", "-c", _SYSTEM, "bash", ROOT, self._directory),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert self._system.stdout is not None
        self._pid = int(await self._system.stdout.readline())
        self._write("/etc/libvirt/qemu.conf", _QEMU_CONF.encode())
        self._write("/usr/local/bin/vring", _VRING.encode())
        self._write(_INITRD, initramfs(_guest_agent()))
        hook = EXAMPLES / "libvirt" / "qemu"
        self._write("/etc/libvirt/hooks/qemu.d/vring", hook.read_bytes())
        self._server = await asyncio.start_unix_server(self._guest_came, self.path(_SHELL))
        self.path(_SHELL).chmod(0o666)
        await self.start_daemon()

    def path(self, name: str) -> Path:
        """Return where a file of the system's is for us."""
        return Path(f"/proc/{self._pid}/root") / name.lstrip("/")

    def _write(self, name: str, data: bytes) -> None:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o755)

    # --- what an operator does

    async def start_daemon(self) -> None:
        """Start libvirtd; it says that it serves by going to the background."""
        await self.run("libvirtd", "--daemon")

    async def end_daemon(self) -> None:
        """End libvirtd, and nothing that it has started."""
        await self.kill("libvirtd", "TERM")

    def processes(self, word: str) -> list[int]:
        """Return the system's processes with a word in their command lines, as it numbers them."""
        found = []
        for directory in self.path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if word.encode() in (directory / "cmdline").read_bytes():
                    found.append(int(directory.name))
        return sorted(found)

    async def kill(self, word: str, signal: str = "KILL") -> None:
        """Send a signal to these processes, and return when they have ended."""
        pids = self.processes(word)
        await self.run("bash", "-c", f"kill -{signal} {' '.join(map(str, pids))}")
        await until(lambda: not any(self.path(f"/proc/{pid}").exists() for pid in pids))

    def service_is_gone(self) -> bool:
        """Return whether nothing is left of vring's."""
        return not self.path(SOCKETS).exists() and not self.processes("vring_serial")

    async def run(self, *command: str, data: str = "") -> str:
        """Run a command of the system's; its output. Raises CommandFailedError."""
        return await _output(
            *("nsenter", f"--target={self._pid}", "--mount", "--pid", "--net", "--ipc", "--uts"),
            *("--root", "--wd", "--", *command),
            data=data,
        )

    async def virsh(self, *command: str, data: str = "") -> str:
        """Run virsh; its output. Raises CommandFailedError."""
        return (await self.run("virsh", "--quiet", *command, data=data)).strip()

    async def define(self, xml: str) -> None:
        """Define a domain."""
        await self.virsh("define", "--validate", "/dev/stdin", data=xml)

    async def boot(self, *command: str) -> None:
        """Run virsh, which starts the guest, and return when that takes commands."""
        while not self._connected.empty():  # guests of before, which nobody spoke to
            self._connected.get_nowait()
        await self.virsh(*command)
        reader, writer = await self._connected.get()
        self.shell = GuestShell(reader, writer, self._last_words)
        await self.shell.ready(timeout=120)
        await self.shell.run(_SERVICES)

    async def reboot(self, *command: str) -> None:
        """Run virsh, which has the guest reboot, and return when that takes commands again."""
        await self.shell.ready(timeout=120, after=lambda: self.virsh(*command))
        await self.shell.run(_SERVICES)

    async def agent(self, command: str) -> Any:
        """Return what the guest agent says to a command, once libvirt knows that it is there."""
        await until(self._has_agent, "the guest agent")
        request = json.dumps({"execute": command})
        return json.loads(await self.virsh("qemu-agent-command", NAME, request))["return"]

    async def _has_agent(self) -> bool:
        return await self._ask_channel(AGENT, "target/@state") == "connected"

    async def channel_path(self, name: str) -> Path:
        """Return where libvirt's own socket of a channel is for us, while the guest runs."""
        return self.path(await self._ask_channel(name, "source/@path"))

    async def _ask_channel(self, name: str, what: str) -> str:
        domain = etree.fromstring(await self.virsh("dumpxml", NAME))
        return str(domain.xpath(f"string(devices/channel[target/@name='{name}']/{what})"))

    async def aclose(self) -> None:
        """End libvirtd, the guest, and what the hook has started."""
        if self._server is not None:
            self._server.close()
        system, self._system = self._system, None
        if system is not None:
            await end(system)
        for writer in self._writers:
            await hang_up(writer)

    async def _guest_came(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        self._connected.put_nowait((reader, writer))

    def _last_words(self) -> str:
        path = self.path(_CONSOLE_LOG)
        return path.read_bytes()[-2000:].decode(errors="replace") if path.exists() else ""


async def _output(*command: str | Path, data: str = "") -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(120):
            output, error = await process.communicate(data.encode())
    finally:
        if process.returncode is None:
            await end(process)
    if process.returncode:
        raise CommandFailedError(f"{shlex.join(map(str, command[-3:]))}: {error.decode()}")
    return output.decode()
