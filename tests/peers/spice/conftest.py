"""A stock SPICE client and what it connects to, in one test; see tests/support/spice.py."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.shared import Shared
from tests.support.spice import Client, EmbeddedSide, SpiceBench, UmlSide, start_bench


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            names = ["libspice-server.so.1", "SpiceClientGLib-2.0.typelib"]
            if "uml" in item.name:
                names += ["linux.uml", "busybox", "virtio_console.ko"]
                names += ["spice-vdagentd", "spice-vdagent", "Xvfb", "xclip", "xrandr"]
            item.add_marker(pytest.mark.peer(*names))


@pytest.fixture(autouse=True)
def no_callback_failed(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """C code cannot be told of an exception, so the test is."""
    yield
    assert "a callback of the SPICE server failed" not in caplog.text


@pytest.fixture
def bench_with(tmp_path: Path) -> Callable[..., AbstractAsyncContextManager[SpiceBench]]:
    """Makes a bench with an embedded guest and these options of the server."""

    @asynccontextmanager
    async def running(**options: object) -> AsyncIterator[SpiceBench]:
        bench = await start_bench(tmp_path, **options)
        try:
            yield bench
        finally:
            await bench.aclose()

    return running


@pytest.fixture(scope="module", params=["embedded", "uml", "shared"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_bench(
    kind: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Shared[SpiceBench]]:
    """One guest of each kind for the tests of a module, since booting one takes a while."""
    base = tmp_path_factory.mktemp("spice")
    side = UmlSide if "uml" in kind else EmbeddedSide

    async def start() -> SpiceBench:
        return await start_bench(Path(tempfile.mkdtemp(dir=base)), side, shared="shared" in kind)

    shared = Shared(start)
    yield shared
    await shared.aclose()
    shutil.rmtree(base)


@pytest_asyncio.fixture(loop_scope="module")
async def bench(
    shared_bench: Shared[SpiceBench], failed: Callable[[], bool]
) -> AsyncIterator[SpiceBench]:
    async with shared_bench.turn(failed) as bench:
        yield bench


@pytest.fixture
def sparse(tmp_path: Path) -> Callable[[int], Path]:
    """Makes a file of a size that takes no room."""

    def make(size: int) -> Path:
        path = tmp_path / "sparse"
        with path.open("wb") as file:
            os.truncate(file.fileno(), size)
        return path

    return make


@pytest.fixture
async def client_process() -> AsyncIterator[Client]:
    """A client that is not connected to anything yet."""
    client = await Client.start()
    yield client
    await client.kill()


@pytest.fixture
def unused_port() -> int:
    """A TCP port of this host that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
