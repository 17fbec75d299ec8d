"""A worker in its sandbox tries to leave it, in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vring_serial.config.load import load_topology
from vring_serial.config.qemu_options import QemuOptions
from vring_serial.errors import ConfigError
from vring_serial.service import landlock
from vring_serial.service.reach import reach_of
from vring_serial.service.sandbox import LAYERS, Sandbox

#: Enters a sandbox, and then runs what the test wants with what it needs at hand.
PROGRAM = """
import ctypes, errno, os, resource, signal, socket, sys, threading, time
from vring import Pump
from vring_serial.service.reach import Reach
from vring_serial.service.last_words import LastWords
from vring_serial.service.sandbox import Sandbox, enter

libc = ctypes.CDLL(None, use_errno=True)
here = sys.argv[1]
pump = Pump()
asked, answered = threading.Event(), threading.Event()
def elsewhere():
    asked.wait()
    act()
    answered.set()
thread = threading.Thread(target=elsewhere, daemon=True)

def refused(call):
    try:
        call()
    except OSError as error:
        assert error.errno in (errno.EACCES, errno.EPERM), error
    else:
        raise AssertionError("it went through")

reach = Reach(read={sys.prefix, sys.base_prefix, "/usr/lib", "/lib", "/proc/self"})
def go_in(text="on", user=None):
    line = b"YYYY-mm-dd HH:MM:SS.mmm call  ended it\\n"
    said = LastWords(line, time_at=0, name_at=29, ahead_of_utc=0, fd=2)
    return enter(Sandbox.parse(text, user), reach, said)
"""

needs_filters = pytest.mark.skipif(
    not Path("/usr/lib").exists() or not any(Path("/usr/lib").rglob("libseccomp.so.2")),
    reason="apt-get install libseccomp2 (make peers)",
)
needs_landlock = pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only a superuser has what to give up")


def run(directory, script):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM + script, directory],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def goes_well(directory, script):
    result = run(directory, script)
    assert result.returncode == 0, result.stderr
    return result


# --- paths


@needs_landlock
@pytest.mark.parametrize("where", ["main", "another thread"])
def test_files_outside_cannot_be_opened_made_or_removed(tmp_path, where):
    (tmp_path / "secret").write_text("x")
    act = """
def act():
    refused(lambda: open(f"{here}/secret"))
    refused(lambda: open(f"/proc/self/root/{here}/secret"))
    refused(lambda: open(f"{here}/new", "w"))
    refused(lambda: os.unlink(f"{here}/secret"))
    refused(lambda: os.mkdir(f"{here}/d"))
    refused(lambda: os.symlink("/etc", f"{here}/l"))
    refused(lambda: os.listdir("/"))
"""
    if where == "main":
        script = act + "go_in('on,seccomp=off'); act()"
    else:  # it was there before
        script = act + (
            "done = []\n"
            "inner = act\n"
            "def act(): inner(); done.append(1)\n"
            "thread.start(); go_in('on,seccomp=off'); asked.set(); thread.join(); assert done"
        )
    goes_well(tmp_path, script)
    assert os.listdir(tmp_path) == ["secret"]


@needs_landlock
def test_what_host_ends_need_can_be_opened_made_and_removed(tmp_path):
    for name in ("logs", "sockets"):
        (tmp_path / name).mkdir()
    (tmp_path / "sockets" / "s").touch()
    goes_well(
        tmp_path,
        """
reach.appends_to(f"{here}/logs/log")
reach.removes(f"{here}/sockets/s")
go_in()
with open(f"{here}/logs/log", "a") as file: file.write("x")
os.unlink(f"{here}/sockets/s")
refused(lambda: os.unlink(f"{here}/logs/log"))
refused(lambda: open(f"{here}/sockets/new", "w"))
refused(lambda: open(f"{here}/logs/log"))
os._exit(0)
""",
    )
    assert (tmp_path / "logs" / "log").read_text() == "x"


@needs_landlock
def test_a_port_that_no_host_end_has_cannot_be_connected_to(tmp_path):
    goes_well(
        tmp_path,
        """
listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
ports = [s.getsockname()[1] for s in listening]
reach.tcp.add(ports[0])
go_in()
socket.create_connection(("127.0.0.1", ports[0]))
refused(lambda: socket.create_connection(("127.0.0.1", ports[1])))
os._exit(0)
""",
    )


# --- system calls


@needs_filters
def test_without_peers_to_connect_to_there_are_no_new_sockets(tmp_path):
    goes_well(tmp_path, "go_in(); refused(lambda: socket.socket(socket.AF_UNIX)); os._exit(0)")


@needs_filters
def test_limits_cannot_be_raised(tmp_path):
    goes_well(
        tmp_path,
        """
go_in("on,descriptors=100")
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (100, 100)
try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
except (OSError, ValueError):
    os._exit(0)
""",
    )


@needs_filters
@pytest.mark.parametrize(
    ("name", "call"),
    {
        "execve": 'os.execv("/bin/true", ["true"])',
        "ptrace": "libc.ptrace(0, 0, 0, 0)",
        "unshare": "libc.unshare(0x10000000)",
        "setresuid": "libc.setresuid(1, 1, 1)",
        "mount": "libc.mount(b'a', b'/mnt', b'tmpfs', 0, None)",
        "io_uring_setup": "libc.syscall(425, 1, None)",
        "process_vm_readv": "libc.process_vm_readv(1, None, 0, None, 0, 0)",
        "kill": "os.kill(os.getppid(), 0)",
        "clone": "libc.syscall(56, 17, 0, 0, 0, 0)",
        "connect": "libc.connect(0, None, 0)",
        "ioctl": "libc.ioctl(0, 0x5412, b'x')",
    }.items(),
)
def test_a_call_that_is_not_allowed_is_named_and_is_the_last(tmp_path, name, call):
    result = run(tmp_path, f"go_in()\n{call}\nos._exit(0)")
    assert result.returncode == -signal.SIGSYS, result.stderr
    year, _, rest = result.stderr.partition("-")
    assert year.isdigit()
    assert rest.endswith(f" call {name} ended it\n")


@needs_filters
def test_threads_that_were_there_before_are_held_to_it_and_new_ones_can_be_made(tmp_path):
    script = """
def act(): libc.unshare(0x10000000)
thread.start()
go_in()
other = threading.Thread(target=int); other.start(); other.join()
asked.set(); thread.join()
os._exit(0)
"""
    result = run(tmp_path, script)
    assert result.returncode == -signal.SIGSYS, result.stderr
    assert " call unshare ended it" in result.stderr


# --- who the process is


@needs_root
def test_no_thread_has_capabilities_or_gets_new_ones(tmp_path):
    result = goes_well(
        tmp_path,
        """
thread.start()
def act(): pass
entered = go_in("on,seccomp=off,landlock=off")
assert len(os.listdir("/proc/self/task")) >= 2
for task in os.listdir("/proc/self/task"):
    status = dict(l.split(":\\t", 1) for l in open(f"/proc/self/task/{task}/status"))
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, (task, name, status[name])
    assert status["NoNewPrivs"] == "1\\n"
asked.set()
print(entered.on)
""",
    )
    assert result.stdout == "['no-new-privileges', 'no capabilities']\n"


@needs_root
def test_a_superuser_keeps_what_it_takes_to_write_where_he_must(tmp_path):
    os.chown(tmp_path, 1, 1)
    goes_well(
        tmp_path,
        """
reach.appends_to(f"{here}/log")
entered = go_in()
assert "no capabilities but DAC_OVERRIDE" in entered.on, entered
open(f"{here}/log", "a").close()
os._exit(0)
""",
    )


@needs_root
def test_a_user_of_its_own(tmp_path):
    os.chmod(tmp_path, 0o755)
    result = goes_well(
        tmp_path,
        """
reach.appends_to(f"{here}/log")
entered = go_in("on", "nobody")
assert os.getresuid() == (65534,) * 3 and set(os.getresgid()) == {65534}, os.getresuid()
os.readlink("/proc/self/fd/0")
open("/proc/self/fdinfo/0").close()
print(entered.unwritable)
sys.stdout.flush()
os._exit(0)
""",
    )
    assert result.stdout == f"['{tmp_path}']\n"


# --- the option


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("on", set(LAYERS)),
        ("off", set()),
        ("on,landlock=off", {"capabilities", "seccomp"}),
        ("off,seccomp=on", {"seccomp"}),
        ("no-landlock,no-seccomp", {"capabilities"}),
    ],
)
def test_layers_are_chosen(text, layers):
    assert Sandbox.parse(text) == Sandbox(frozenset(layers))


def test_limits_are_given(tmp_path):
    sandbox = Sandbox.parse("on,memory=1G,descriptors=500")
    assert (sandbox.memory, sandbox.descriptors) == (1 << 30, 500)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("ofn", "did you mean on"),
        ("on,landlok=off", "did you mean landlock"),
        ("seccomp=maybe", "neither on nor off"),
        ("on,off", "known:"),
        ("memory", "is not a size"),
    ],
)
def test_mistakes_are_told(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Sandbox.parse(text)


def test_a_user_that_is_not_there_is_told():
    with pytest.raises(ConfigError, match="there is no user no-such-user"):
        Sandbox.parse("on", "no-such-user:x")


# --- what is needed


def reach_for(*chardevs):
    ports = [f"chardev=c{i}" for i in range(len(chardevs))]
    ends = tuple(c.replace(",", f",id=c{i},", 1) for i, c in enumerate(chardevs))
    options = QemuOptions(ends, tuple(ports), (), None, None)
    return reach_of([load_topology(None, options, channel_directory="")], removes=["run/v"])


def test_reach_follows_from_the_host_ends():
    reach = reach_for(
        "socket,path=/a/s,server=on",
        "socket,path=/b/s",
        "file,path=/c/f,append=on",
        "pty,path=/d/l",
    )
    assert reach.removed_in == {"run", "/a", "/d"}
    assert reach.made_in == {"/c"}
    assert (reach.unix, reach.abstract, reach.tcp) == (False, False, set())


def test_reach_of_those_who_connect_again():
    assert reach_for("socket,path=/b/s,reconnect=1").unix
    assert reach_for("socket,path=x,abstract=on,reconnect=1").abstract
    tcp = reach_for("socket,host=h,port=7,reconnect=1")
    assert tcp.tcp == {7, 53}
    assert "/etc/hosts" in tcp.read
