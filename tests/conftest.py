"""What all tests share: real peers are never skipped in CI, only on a machine that lacks them."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.call_end import CallEnd
from tests.support.hostile_files import HostileFiles
from tests.support.waiting import LoopClock

_QEMU_ROOT = os.environ.get("QEMU_ROOT", "/var/cache/vring/qemu-root")
#: Peers that are not a program on PATH, and the file that shows they are there.
PEER_FILES = {
    "virtio_console.ko": "/usr/lib/uml/modules/*/kernel/drivers/char/virtio_console.ko",
    "libspice-server.so.1": "/usr/lib/*/libspice-server.so.1",
    "SpiceClientGLib-2.0.typelib": "/usr/lib/*/girepository-1.0/SpiceClientGLib-2.0.typelib",
    "qemu-root": os.path.join(_QEMU_ROOT, ".vring-root"),
    "libvirtd": os.path.join(_QEMU_ROOT, "usr/sbin/libvirtd"),  # roots of before lack it
    "vdagent-root": os.path.join(
        os.environ.get("VDAGENT_ROOT", "/var/cache/vring/vdagent-root"), ".vring-root"
    ),
}
#: Who brings those that `make peers` does not.
MAKE_TARGETS = {
    "qemu-root": "make peers-qemu",
    "libvirtd": "make peers-qemu",
    "vdagent-root": "make peers-vdagent",
}


# A busy machine takes longer for everything: that says nothing about what is tested.
settings.register_profile("vring", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vring")


def is_installed(name: str) -> bool:
    if name in PEER_FILES:
        pattern = Path(PEER_FILES[name])
        return any(Path("/").glob(str(pattern.relative_to("/"))))
    # Debian keeps daemons in sbin, which a user's PATH may lack.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return shutil.which(name, path=path) is not None


def what_is_missing(item: pytest.Item) -> str:
    """The line that says what to install, or nothing."""
    names = [name for marker in item.iter_markers("peer") for name in marker.args]
    missing = [name for name in dict.fromkeys(names) if not is_installed(name)]
    targets = {MAKE_TARGETS.get(name, "make peers") for name in missing}
    how = ", ".join(f"`{target}`" for target in sorted(targets))
    return f"{', '.join(missing)} not installed: {how} brings it" if missing else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("CI"):
        return  # a peer that is missing fails the test itself
    for item in items:
        if why := what_is_missing(item):
            item.add_marker(pytest.mark.skip(reason=why))


def pytest_collection_finish() -> None:
    """Leave what was imported out of all later collections, of which tests make thousands.

    Looking through it takes a tenth of a second, and longer than most tests.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """In CI a missing peer is a failure, with the same line that a user's skip shows."""
    if os.environ.get("CI") and (why := what_is_missing(item)):
        pytest.fail(why, pytrace=False)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Commands that run in the test process configure logging; the next test must not notice."""
    loggers = [logging.getLogger(name) for name in (None, "vring", "vring_serial")]
    unraisable = sys.unraisablehook
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    sys.unraisablehook = unraisable
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> Iterator[None]:
    """Processes that tests start hear SIGINT and SIGHUP, also where this one is started without.

    Shells let what runs in the background ignore the one, nohup the other, and whoever is started
    inherits that; what is caught has its default effect there. This one goes on ignoring a hang-up.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hangup = signal.getsignal(signal.SIGHUP)
    if hangup == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    yield
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGHUP, hangup)


@pytest.fixture
def blocked_call_ends_the_run() -> Iterator[None]:
    """Ends the process after a minute: nothing less ends a call that blocks."""
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> LoopClock:
    """The clock of the test's event loop, to be put forward."""
    return LoopClock(monkeypatch)


@pytest.fixture
def out_of_descriptors() -> Callable[[], AbstractContextManager[None]]:
    """``with out_of_descriptors():`` this process can open none; those that are open go on."""

    @contextlib.contextmanager
    def limited() -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)  # the lowest that is not in use
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    return limited


@pytest.fixture
def hostile_files() -> Iterator[HostileFiles]:
    files = HostileFiles()
    yield files
    files.close()


@pytest.fixture
def make_call() -> Iterator[Callable[[str], CallEnd]]:
    """Makes call descriptors, which are closed at the end."""
    made: list[CallEnd] = []

    def make(kind: str) -> CallEnd:
        made.append(CallEnd(kind))
        return made[-1]

    yield make
    for end in made:
        end.close()
