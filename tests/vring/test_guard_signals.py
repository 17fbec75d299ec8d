"""Whose a SIGBUS is: the guard's, or that of handlers from before and after it."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest


def run(script: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, with a region mapped, `foreign` a mapping that is not."""
    setup = """
        import ctypes, faulthandler, mmap, os, signal, sys
        import vring
        def guard():
            fd = os.memfd_create("ours")
            os.ftruncate(fd, 4096)
            return fd, vring.Region.map(fd, 4096, guest_addr=0)
        def foreign():
            fd = os.memfd_create("foreign")
            os.ftruncate(fd, 4096)
            mapped = mmap.mmap(fd, 4096)
            os.ftruncate(fd, 0)
            return mapped[0]
        def lose(fd, region):
            os.ftruncate(fd, 0)
            assert bytes(memoryview(region)[:1]) == bytes(1)
            assert region.lost
            print("lost", flush=True)
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(setup) + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    "cause", ["foreign()", "os.kill(os.getpid(), signal.SIGBUS)", "signal.raise_signal(7)"]
)
@pytest.mark.parametrize("before", ["", "signal.signal(signal.SIGBUS, signal.SIG_DFL)"])
def test_a_foreign_sigbus_kills(cause: str, before: str) -> None:
    done = run(f"""
        {before}
        fd, region = guard()
        lose(fd, region)
        {cause}
        print("survived")
    """)
    assert (done.stdout, done.returncode) == ("lost\n", -signal.SIGBUS)


def test_faulthandler_still_says_where() -> None:
    done = run("""
        faulthandler.enable()
        fd, region = guard()
        lose(fd, region)
        foreign()
    """)
    assert done.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in done.stderr
    assert "in foreign" in done.stderr


def test_an_ignored_signal_is_ignored_and_an_ignored_fault_is_not() -> None:
    done = run("""
        signal.signal(signal.SIGBUS, signal.SIG_IGN)
        lose(*guard())
        os.kill(os.getpid(), signal.SIGBUS)
        print("ignored", flush=True)
        foreign()
    """)
    assert (done.stdout, done.returncode) == ("lost\nignored\n", -signal.SIGBUS)


def test_a_handler_in_python_is_called() -> None:
    done = run("""
        signal.signal(signal.SIGBUS, lambda number, frame: print("told", number, flush=True))
        lose(*guard())
        os.kill(os.getpid(), signal.SIGBUS)
        lose(*guard())
    """)
    assert (done.stdout, done.returncode) == ("lost\ntold 7\nlost\n", 0)


def test_a_handler_with_siginfo_gets_it() -> None:
    """Installed with sigaction, as only other languages can."""
    done = run("""
        class Action(ctypes.Structure):
            _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_ulong * 16),
                        ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p)]
        @ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(ctypes.c_int * 32), ctypes.c_void_p)
        def handler(number, info, context):
            address = ctypes.cast(info, ctypes.POINTER(ctypes.c_uint64))[2]
            print("told", number, info.contents[2], address == base, flush=True)
            os._exit(3)
        action = Action(ctypes.cast(handler, ctypes.c_void_p), (ctypes.c_ulong * 16)(), 4, None)
        libc = ctypes.CDLL(None)
        assert libc.sigaction(signal.SIGBUS, ctypes.byref(action), None) == 0
        lose(*guard())
        fd = os.memfd_create("foreign")
        os.ftruncate(fd, 4096)
        mapped = mmap.mmap(fd, 4096)
        base = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        os.ftruncate(fd, 0)
        mapped[0]
    """)
    assert (done.stdout, done.returncode) == ("lost\ntold 7 2 True\n", 3)


TAKEN = "another handler of SIGBUS was installed over vring's"


@pytest.mark.parametrize("times", [1, 40])
def test_faulthandler_that_comes_later_is_noticed_at_the_next_map(times: int) -> None:
    done = run(f"""
        first = guard()
        for _ in range({times}):
            faulthandler.enable()
            lose(*guard())
            faulthandler.disable()
            faulthandler.enable()
            lose(*guard())
        lose(*first)
        foreign()
    """)
    assert done.returncode == -signal.SIGBUS
    assert done.stdout == "lost\n" * (2 * times + 1)
    assert done.stderr.count(TAKEN) == 1
    assert done.stderr.count("Fatal Python error: Bus error") == 1
    assert "in foreign" in done.stderr


def test_handlers_that_come_later_are_called() -> None:
    done = run("""
        faulthandler.enable()
        fd, region = guard()
        for name in ("one", "two"):
            signal.signal(signal.SIGBUS, lambda number, frame, name=name: print(name, flush=True))
            lose(*guard())
            os.kill(os.getpid(), signal.SIGBUS)
        lose(fd, region)
    """)
    assert (done.stdout, done.returncode) == ("lost\none\nlost\ntwo\nlost\n", 0)
    assert done.stderr.count(TAKEN) == 1


@pytest.mark.parametrize("cause", ["foreign()", "os.kill(os.getpid(), signal.SIGBUS)"])
def test_a_default_that_comes_later_kills(cause: str) -> None:
    done = run(f"""
        signal.signal(signal.SIGBUS, lambda number, frame: print("told", flush=True))
        guard()
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        lose(*guard())
        {cause}
    """)
    assert (done.stdout, done.returncode) == ("lost\n", -signal.SIGBUS)


@pytest.mark.parametrize("cause", ["foreign()", "os.kill(os.getpid(), signal.SIGBUS)"])
def test_a_handler_that_calls_the_one_before_it_is_called_once(cause: str) -> None:
    """As handlers in C do: ours passes on to it, it passes on to ours."""
    done = run(f"""
        class Action(ctypes.Structure):
            _fields_ = [("handler", ctypes.c_void_p), ("mask", ctypes.c_ulong * 16),
                        ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p)]
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        @kind
        def handler(number, info, context):
            print("told", number, flush=True)
            kind(before.handler)(number, info, context)
        action = Action(ctypes.cast(handler, ctypes.c_void_p), (ctypes.c_ulong * 16)(), 4, None)
        before = Action()
        fd, region = guard()
        libc = ctypes.CDLL(None)
        libc.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(before))
        lose(*guard())
        lose(fd, region)
        {cause}
    """)
    assert (done.stdout, done.returncode) == ("lost\nlost\ntold 7\n", -signal.SIGBUS)


def test_an_unmapped_region_is_foreign_again() -> None:
    done = run("""
        fd, region = guard()
        lose(fd, region)
        base = ctypes.addressof(ctypes.c_char.from_buffer(region))
        del region
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p] + [ctypes.c_long] * 5
        assert libc.mmap(base, 4096, 3, 0x11, fd, 0) == base
        ctypes.c_char.from_address(base).value
        print("survived")
    """)
    assert (done.stdout, done.returncode) == ("lost\n", -signal.SIGBUS)


def test_a_child_of_fork_is_guarded_too() -> None:
    done = run("""
        fd, region = guard()
        child = os.fork()
        if child == 0:
            lose(fd, region)
            os._exit(5)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
        assert not region.lost
        lose(fd, region)
    """)
    assert (done.stdout, done.returncode, done.stderr) == ("lost\nlost\n", 0, "")
