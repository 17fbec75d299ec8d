"""systemd starts the service, passes its sockets, hears how it is, and has units for it."""

from __future__ import annotations

import contextlib
import grp
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.keeper import kept, socket_ports
from tests.support.processes import running
from tests.support.service_manager import Manager
from tests.support.waiting import until, until_file_says
from vring_serial import EmbeddedGuest
from vring_serial.errors import ConfigError, ResourceError
from vring_serial.service.systemd import listen_fds, watchdog_seconds
from vring_serial.unix_socket import SocketAccess, UnixListener, set_access

UNITS = Path(__file__).parents[2] / "examples" / "systemd"
NULL_PORT = ("--chardev", "null,id=n", "--port", "chardev=n,nr=1,name=org.example.data1")


@pytest.fixture(autouse=True)
def short_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def manager(tmp_path):
    with contextlib.closing(Manager(tmp_path)) as manager:
        yield manager


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


# --- what it passes


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"LISTEN_PID": "x", "LISTEN_FDS": "1"}, "they are numbers"),
        ({"LISTEN_PID": "PID", "LISTEN_FDS": "-1"}, "they are numbers"),
        ({"LISTEN_PID": "PID", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a"}, "1 names for 2"),
        ({"LISTEN_PID": "PID", "LISTEN_FDS": "4000"}, "unknown is not open"),
    ],
)
def test_an_environment_that_makes_no_sense_is_told(environment, why):
    given = {name: text.replace("PID", str(os.getpid())) for name, text in environment.items()}
    with pytest.raises(ConfigError, match=why):
        listen_fds(given)
    with pytest.raises(ConfigError, match="WATCHDOG_USEC=soon"):
        watchdog_seconds({"WATCHDOG_USEC": "soon"})


def test_what_is_meant_for_another_process_is_left_alone():
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "WATCHDOG_USEC": "5", "WATCHDOG_PID": "1"}
    assert listen_fds(environment) == []
    assert watchdog_seconds(environment) is None
    assert environment == {}


@pytest.mark.parametrize("keeper", ["--keeper", "--no-keeper"])
async def test_a_socket_that_systemd_listens_on_is_served_and_stays(tmp_path, keeper):
    tool = shutil.which("systemd-socket-activate")
    if tool is None:
        pytest.skip("systemd-socket-activate is not installed (Debian: systemd)")
    log = tmp_path / "log"
    ports = [*NULL_PORT, "--chardev", "socket,id=c,path=c,server=on,wait=off"]
    ports += ["--port", "chardev=c,nr=2,name=org.example.data2"]
    with log.open("wb") as stream:
        async with running(
            *(tool, "-l", str(tmp_path / "v"), "-l", str(tmp_path / "c")),
            *(sys.executable, "-m", "vring_serial", "serve", keeper, "--vhost-user", "v", *ports),
            stderr=stream,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            await until_file_says(log, "Listening on", 2)
            inodes = [os.stat(name).st_ino for name in "vc"]
            async with EmbeddedGuest("v", memory=32 << 20) as guest:
                await guest.wait_port(name="org.example.data2")
                if keeper == "--keeper":
                    children = f"/proc/{process.pid}/task/{process.pid}/children"
                    worker = int(Path(children).read_text())
                    os.kill(worker, signal.SIGKILL)
                    await until_file_says(log, "serving;", 2)
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect("c")
                    port = await guest.wait_port(name="org.example.data2")
                    await port.wait_host()
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    assert [os.stat(name).st_ino for name in "vc"] == inodes


async def test_a_descriptor_that_is_no_listening_socket_is_told(tmp_path):
    launch = "import os,sys; os.environ['LISTEN_PID']=str(os.getpid()); os.dup2(0, 3); "
    launch += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    async with running(
        *(sys.executable, "-c", launch, "-m", "vring_serial", "serve", "--vhost-user", "v"),
        *NULL_PORT,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"LISTEN_FDS": "1"},
    ) as process:
        _, text = await process.communicate()
    assert process.returncode == 2
    assert text == b"vring: LISTEN_FDS: descriptor 3 is no listening stream socket\n"


# --- what it hears


async def test_it_hears_of_start_reload_upgrade_and_end(tmp_path, manager):
    environment = os.environ | manager.environment
    async with kept(tmp_path, *NULL_PORT, ready="", environment=environment) as keeper:
        main = f"MAINPID={keeper.process.pid}"
        await manager.heard("READY=1")
        assert manager.told == ["READY=1", main, "STATUS=serving vring"]
        keeper.process.send_signal(signal.SIGHUP)
        await manager.heard("READY=1", 2)
        assert [line.partition("=")[0] for line in manager.told[3:5]] == [
            "RELOADING",
            "MONOTONIC_USEC",
        ]
        keeper.process.send_signal(signal.SIGUSR2)
        await manager.heard("RELOADING=1", 2)
        await manager.heard(main, 3)
        assert "STATUS=upgraded from" in "\n".join(manager.told)
        await keeper.kill()
        await until(lambda: manager.hear() or "by SIGKILL" in manager.told[-1])
        keeper.process.terminate()
        await manager.heard("STOPPING=1")
        assert await keeper.process.wait() == 0


async def test_a_service_whose_manager_has_gone_serves_on(tmp_path, manager):
    environment = os.environ | manager.environment
    async with kept(tmp_path, *NULL_PORT, environment=environment) as keeper:
        manager.close()
        keeper.process.send_signal(signal.SIGHUP)
        await keeper.logged("files were opened anew")
        assert await keeper.stop() == 0


async def test_a_manager_that_cannot_be_reached_is_told(tmp_path):
    environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "none")}
    async with kept(tmp_path, *NULL_PORT, ready="", environment=environment) as keeper:
        assert await keeper.process.wait() == 1
    assert re.fullmatch(r"vring: NOTIFY_SOCKET .*none: No such file or directory\n", keeper.log)


async def test_a_worker_that_hangs_is_replaced_and_the_watchdog_is_answered(tmp_path):
    with contextlib.closing(Manager(tmp_path, watchdog=4)) as manager:
        environment = os.environ | manager.environment
        async with kept(tmp_path, *NULL_PORT, environment=environment) as keeper:
            await manager.heard("WATCHDOG=1", 2)
            victim = keeper.worker
            os.kill(victim, signal.SIGSTOP)
            await keeper.logged("its worker does not do anything any more, and is ended")
            os.kill(victim, signal.SIGCONT)  # only then it can be ended by SIGABRT
            await keeper.replaced(victim)
            manager.hear()
            await manager.heard("WATCHDOG=1", manager.told.count("WATCHDOG=1") + 2)
            assert await keeper.stop() == 0


# --- permissions


@pytest.fixture
def access():
    yield set_access
    set_access(SocketAccess())


@pytest.mark.parametrize("umask", [0, 0o077])
def test_a_socket_has_its_mode_when_it_is_made_whatever_the_umask(access, umask):
    before = os.umask(umask)
    try:
        access(SocketAccess(0o620))
        with contextlib.closing(UnixListener("s")):
            assert mode_of("s") == 0o620
        assert os.umask(umask) == umask
    finally:
        os.umask(before)


def test_a_socket_that_cannot_have_its_owner_is_not_made(access):
    if os.geteuid() == 0:
        pytest.skip("the superuser gives files away as he likes")
    access(SocketAccess(uid=0))
    with pytest.raises(ResourceError, match="s: Operation not permitted"):
        UnixListener("s")
    assert not os.path.exists("s")


async def test_all_sockets_have_mode_and_group(tmp_path):
    group = grp.getgrgid(os.getgroups()[-1] if os.geteuid() else 1)
    options = (
        *socket_ports([1]),
        *("--chardev", "spicevmc,id=a", "--port", "chardev=a,nr=2,name=com.redhat.spice.0"),
        *("--agent-socket", "agent", "--qmp", "unix:qmp,server=on,wait=off"),
        *("--socket-mode", "0660", "--socket-group", group.gr_name),
    )
    async with kept(tmp_path, *options) as keeper:
        await keeper.logged("QMP at")
        for path in ("v", "c1", "agent", "qmp"):
            assert (mode_of(path), os.stat(path).st_gid) == (0o660, group.gr_gid), path
        assert await keeper.stop() == 0


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("mode", "rw", "it is no octal number"),
        ("mode", "1777", "it is not between 0 and 0777"),
        ("owner", "nobody-at-all", "there is no user nobody-at-all"),
        ("group", "nobody-at-all", "there is no group nobody-at-all"),
    ],
)
def test_wrong_permissions_are_told(option, value, why):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vring_serial", "serve", "--vhost-user", "v", *NULL_PORT),
            *(f"--socket-{option}", value),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"vring: --socket-{option} {value}: {why}")


# --- units


def units(directory):
    """The units, with the command that there is and directories that there are."""
    for unit in UNITS.iterdir():
        text = unit.read_text().replace("/usr/bin/vring", shutil.which("true") or "/bin/true")
        (directory / unit.name).write_text(text)


def test_the_units_are_valid(tmp_path):
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed (Debian: systemd)")
    units(tmp_path)
    done = subprocess.run(
        [tool, "verify", "./vring@vm1.service", "./vring@vm1.socket"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


async def test_the_units_command_serves_a_domain(tmp_path, manager):
    tool = shutil.which("systemd-socket-activate")
    if tool is None:
        pytest.skip("systemd-socket-activate is not installed (Debian: systemd)")
    text = (UNITS / "vring@.service").read_text().replace("\\\n", " ")
    command = re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)[1]
    listens = re.search(r"^ListenStream=(.*)$", (UNITS / "vring@.socket").read_text(), re.M)[1]
    (tmp_path / "run" / "vm1").mkdir(parents=True)
    (tmp_path / "vm1.xml").write_text(
        "<domain><devices><channel type='unix'>"
        "<target type='virtio' name='org.example.data1'/></channel></devices></domain>"
    )

    def here(words):
        words = words.replace("%i", "vm1").replace("/run/vring", str(tmp_path / "run"))
        return words.replace("/etc/vring", str(tmp_path)).split()

    program, *arguments = here(command)
    assert program == "/usr/bin/vring"
    log = tmp_path / "log"
    with log.open("wb") as stream:
        async with running(
            *(tool, "-l", *here(listens), "-E", f"NOTIFY_SOCKET={tmp_path / 'notify'}"),
            *(sys.executable, "-m", "vring_serial", *arguments),
            stderr=stream,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            (socket_path,) = here(listens)
            await until_file_says(log, "Listening on")
            async with EmbeddedGuest(socket_path, memory=32 << 20) as guest:
                await guest.wait_port(name="org.example.data1")
                await manager.heard(f"MAINPID={process.pid}")
                assert mode_of(tmp_path / "run" / "vm1" / "vring.org.example.data1") == 0o660
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
