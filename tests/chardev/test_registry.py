"""The table of kinds."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from vring_serial import chardev
from vring_serial.chardev.socket import SocketOptions
from vring_serial.errors import ConfigError

EXAMPLES: dict[str, dict[str, object]] = {
    "socket": {"path": "s"},
    "pty": {},
    "file": {"path": "out"},
    "pipe": {"path": "p"},
    "serial": {"path": "/dev/ttyS0"},
    "stdio": {},
    "udp": {"port": 9},
    "null": {},
    "ringbuf": {},
    "console": {"path": "c"},
    "spicevmc": {},
    "spiceport": {"name": "org.example.0"},
}


def test_the_examples_are_all_kinds() -> None:
    assert set(EXAMPLES) == set(chardev.kinds())


@pytest.mark.parametrize("kind", EXAMPLES)
def test_every_kind_can_be_made(kind: str) -> None:
    options = chardev.options_type(kind)(**EXAMPLES[kind])
    factory = asyncio.Protocol if kind.startswith("spice") else None
    made = chardev.make(kind, "dut", options, factory=factory)
    assert made.id == "dut"
    assert made.description


@pytest.mark.parametrize("kind", EXAMPLES)
def test_without_options_the_defaults_hold_or_what_is_missing_is_named(kind: str) -> None:
    factory = asyncio.Protocol if kind.startswith("spice") else None
    if EXAMPLES[kind]:
        with pytest.raises(ConfigError) as caught:
            chardev.make(kind, "dut", factory=factory)
        assert caught.value.where in EXAMPLES[kind]
    else:
        chardev.make(kind, "dut", factory=factory)


def test_a_kind_that_is_not() -> None:
    with pytest.raises(ConfigError, match=r"'tcp'.*file.*null.*pipe"):
        chardev.make("tcp", "dut")


def test_options_of_another_kind() -> None:
    with pytest.raises(TypeError, match="PtyOptions, not SocketOptions"):
        chardev.make("pty", "dut", SocketOptions(path="s"))


def test_spicevmc_needs_its_agent() -> None:
    with pytest.raises(ConfigError, match=r"dut.*agent"):
        chardev.make("spicevmc", "dut")


def test_keys_are_spelled_as_in_qemu() -> None:
    keys = chardev.options_type("socket").keys()
    assert keys["reconnect-ms"].name == "reconnect_ms"
    assert {"path", "host", "port", "server", "wait", "nodelay", "abstract"} <= set(keys)
    assert set(chardev.options_type("file").keys()) == {"path", "append", "input-path"}


def test_a_kind_is_imported_when_it_is_asked_for() -> None:
    script = (
        "import sys; from vring_serial import chardev; chardev.kinds();"
        "names = [m for m in sys.modules if m.startswith('vring_serial.chardev.')];"
        "print(*[name.rpartition('.')[2] for name in names])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert {"base", "options", "registry"} <= loaded
    assert not loaded & {
        "file",
        "null",
        "pipe",
        "protocol",
        "pty",
        "ringbuf",
        "socket",
        "stdio",
        "console",
    }
