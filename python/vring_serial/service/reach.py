"""What a process that serves must still reach when everything is open.

Host ends reopen files, connect again and remove what they made; Python and the libraries load parts
of themselves late.
"""

from __future__ import annotations

import os
import stat
import sysconfig
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field

import vring
from vring_serial import __file__ as package
from vring_serial.chardev.console import ConsoleOptions
from vring_serial.chardev.file import FileOptions
from vring_serial.chardev.pty import PtyOptions
from vring_serial.chardev.serial import SerialOptions
from vring_serial.chardev.socket import SocketOptions
from vring_serial.config.topology import ChardevConfig, Topology

#: Read by the C library, Python and OpenSSL when they feel like it.
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/usr/share/zoneinfo")
_SETTINGS = (
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/ssl/openssl.cnf",
    "/etc/pki/tls/openssl.cnf",
)
#: /dev/tty says whether the terminal has hung up; /proc/self what a peer's descriptors are.
_SYSTEM = ("/dev/tty", "/dev/urandom", "/proc/self")
#: Where new terminals come from.
_TERMINALS = ("/dev/ptmx", "/dev/pts")
#: What it takes to find the address of a name.
_NAMES = tuple(
    f"/etc/{name}"
    for name in ("hosts", "resolv.conf", "nsswitch.conf", "gai.conf", "host.conf", "services")
)
#: DNS, for an answer that is too long for UDP.
_DNS_PORT = 53


@dataclass(slots=True)
class Reach:
    """Paths and peers.

    Attributes:
        read: files and directories, with all that is in them.
        made_in: directories in which files are made, and written.
        emptied_in: those of them in which files are emptied, too.
        removed_in: directories in which files, sockets and links are removed.
        written: files that are opened for writing.
        scratch: directories for temporary files.
        changed_in: directories in which host ends of every kind are made and removed.
        terminals: device files that are opened as terminals.
        renames: files are renamed in the directories where they are made and removed.
        unix: unix sockets are connected to.
        abstract: so are abstract ones.
        tcp: ports that are connected to, by name or address.
        listens: sockets that others have made are listened on.
    """

    read: set[str] = field(default_factory=set)
    made_in: set[str] = field(default_factory=set)
    emptied_in: set[str] = field(default_factory=set)
    removed_in: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    scratch: set[str] = field(default_factory=set)
    changed_in: set[str] = field(default_factory=set)
    terminals: set[str] = field(default_factory=set)
    renames: bool = False
    unix: bool = False
    abstract: bool = False
    tcp: set[int] = field(default_factory=set)
    listens: bool = False

    @property
    def directories(self) -> set[str]:
        """Those that are written to."""
        return self.made_in | self.removed_in | self.changed_in

    def appends_to(self, path: str) -> None:
        """Note a file that is opened again, and made again if a log rotation has renamed it."""
        try:
            is_regular = stat.S_ISREG(os.stat(path).st_mode)
        except OSError:
            is_regular = True
        if is_regular:
            self.made_in.add(_directory(path))
        self.written.add(path)

    def removes(self, path: str) -> None:
        """Note what the process made and removes."""
        self.removed_in.add(_directory(path))


def reach_of(
    topologies: Iterable[Topology],
    *,
    removes: Iterable[str] = (),
    appends_to: Iterable[str] = (),
    unix: bool = False,
    changes_in: Iterable[str] = (),
) -> Reach:
    """Return what it takes to go on serving.

    Args:
        topologies: what is served.
        removes: sockets and files that are removed at the end.
        appends_to: logs.
        unix: frontends are connected to.
        changes_in: directories in which host ends are made while it runs.
    """
    reach = Reach(unix=unix, changed_in=set(changes_in))
    python = [sysconfig.get_path(n) for n in ("stdlib", "platstdlib", "purelib", "platlib")]
    ours = [os.path.dirname(path) for path in (vring.__file__, package)]
    reach.read.update(_LIBRARIES, _SETTINGS, _SYSTEM, python, ours, _loaded_from())
    reach.written.add(os.devnull)
    if reach.changed_in:
        reach.renames = True  # logs that are rotated
        reach.terminals.update(_TERMINALS)
    for path in removes:
        reach.removes(path)
    for path in appends_to:
        reach.appends_to(path)
    for topology in topologies:
        for controller in topology.controllers:
            for port in controller.ports:
                _add(reach, port.chardev)
        spice = None if topology.spice is None else topology.spice.options
        if spice is not None and spice.unix:
            reach.removes(spice.addr)
    if reach.tcp:
        reach.read.update(_NAMES)
        reach.tcp.add(_DNS_PORT)
        reach.unix = True  # services that know names listen on unix sockets
    return reach


def _loaded_from() -> set[str]:
    """Return the directories of the code in this process: what it loads late lies beside it."""
    with open("/proc/self/maps") as maps:
        lines = [line.rstrip("\n").split(maxsplit=5) for line in maps]
    paths = [line[5] for line in lines if len(line) == 6 and "x" in line[1]]
    directories = {os.path.dirname(path) for path in paths if path.startswith("/")}
    return directories - {"/", tempfile.gettempdir(), "/dev/shm"}


def _add(reach: Reach, chardev: ChardevConfig) -> None:
    if chardev.log.logfile:
        reach.appends_to(chardev.log.logfile)
        if chardev.log.logsize and chardev.log.logbackups:
            reach.removes(chardev.log.logfile)
            reach.renames = True
        elif chardev.log.logsize:
            # What was opened before may be emptied anyway, and not what is opened anew.
            reach.emptied_in.add(_directory(chardev.log.logfile))
    match chardev.options:
        case SocketOptions() as options if options.server:
            if options.path and not options.abstract:
                reach.removes(options.path)
        case SocketOptions() as options if options.reconnect_delay:
            if options.path:
                reach.unix = True
                reach.abstract = reach.abstract or options.abstract
            elif options.port is not None:
                reach.tcp.add(options.port)
        case ConsoleOptions(path=path):
            reach.removes(path)
        case PtyOptions(path=path) if path:
            reach.removes(path)
        case SerialOptions(path=path):
            reach.terminals.add(path)
        case FileOptions(path=path):
            reach.appends_to(path)
        case _ if chardev.kind == "spicevmc":
            # Long clipboards and messages wait in temporary files.
            reach.scratch.add(tempfile.gettempdir())
        case _:
            pass


def _directory(path: str) -> str:
    return os.path.dirname(path) or "."
