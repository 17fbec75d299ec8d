"""What was started is stopped where a later part does not start: no thread, descriptor or file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.examples import EXAMPLES, names_of
from tests.support.leaks import held
from vring_serial.bench.rig import Rig
from vring_serial.chardev.file import FileChardev, FileOptions
from vring_serial.chardev.socket import SocketChardev, SocketOptions
from vring_serial.device.console.controller import Controller
from vring_serial.device.console.port import Port
from vring_serial.errors import ResourceError

ROOT = Path(__file__).parents[1]
(README_EXAMPLE,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = held()
    yield
    after = held()
    assert after == before


def test_the_readmes_example_where_the_socket_cannot_be_made(tmp_path: Path) -> None:
    example = README_EXAMPLE.replace("/tmp/vring.sock", str(tmp_path / "missing" / "v"))
    with pytest.raises(ResourceError, match="there is no directory"):
        exec(compile(example, "README.md", "exec"), {"__name__": "readme"})


def test_the_readmes_example_without_a_guest(tmp_path: Path) -> None:
    example = README_EXAMPLE.replace("/tmp/vring.sock", str(tmp_path / "v"))
    example = example.replace("timeout=60", "timeout=0.1")
    with pytest.raises(Exception, match="no SPICE agent within"):
        exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    assert os.listdir(tmp_path) == []


async def test_a_controller_whose_last_chardev_does_not_start(tmp_path: Path) -> None:
    controller = Controller()
    first = SocketChardev("a", SocketOptions(path=str(tmp_path / "a"), server=True, wait=False))
    controller.add_port(Port(1, "a", first))
    missing = FileChardev("b", FileOptions(path=str(tmp_path / "missing" / "out")))
    controller.add_port(Port(2, "b", missing))
    for _ in range(3):
        with pytest.raises(ResourceError, match="chardev b"):
            await controller.start()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("way", ["--vhost-user", "--vfio-user"])
def test_the_entropy_example_where_the_socket_cannot_be_made(tmp_path: Path, way: str) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "custom_device.py")]
    result = subprocess.run(
        [*command, way, str(tmp_path / "missing" / "v")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("custom_device: ")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("options", [[], ["--save", "/nowhere/snapshot"]])
def test_the_unicorn_example_with_a_guest_that_gives_up(
    monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    pytest.importorskip("unicorn")
    names = names_of("unicorn/run.py")
    main = names["main"]
    # A program that writes to the port that ends the machine, and nothing else.
    monkeypatch.setitem(main.__globals__, "compile_guest", lambda directory: b"\xe6\xf4\xf4")
    monkeypatch.setattr(sys, "argv", ["run.py", *options])
    with pytest.raises(SystemExit, match="the guest gave up"):
        main()


def test_a_rig_whose_second_process_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen = subprocess.Popen
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
        if started:
            raise OSError(11, "Resource temporarily unavailable")
        started.append(popen(*arguments, **options))  # type: ignore[call-overload]
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(OSError, match="temporarily unavailable"):
        Rig(tmp_path, 1, [2], "split")
    assert started[0].poll() is not None
