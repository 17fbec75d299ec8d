"""Metrics of a running service, as Prometheus meets them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import shutil
import signal
import socket
import stat
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.support.keeper import kept, socket_ports
from tests.support.waiting import until
from vring_serial import EmbeddedGuest
from vring_serial.errors import ConfigError
from vring_serial.service.link import Answerer, make_link
from vring_serial.service.metrics import server as metrics_server
from vring_serial.service.metrics.families import render
from vring_serial.service.metrics.option import parse_metrics
from vring_serial.service.metrics.readings import read_vm
from vring_serial.service.metrics.server import MetricsServer, Readings
from vring_serial.service.qmp.vm import Vm

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "vring.json"
METRICS = ("--metrics", "0", "--metrics", "unix:m")
SCRAPE = b"GET /metrics HTTP/1.1\r\nHost: x\r\n%s\r\n"
TIMEOUT = 20.0


@pytest.fixture(autouse=True)
def short_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


async def exchange(open_connection, request):
    """Return the head and the body of what is answered."""
    async with asyncio.timeout(TIMEOUT):
        reader, writer = await open_connection()
        try:
            writer.write(request)
            answer = await reader.read()
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.decode(), body


def at_unix(path="m"):
    return lambda: asyncio.open_unix_connection(path)


def at_tcp(log):
    host, port = re.search(r"metrics at http://([\d.]+):(\d+)/metrics", log).groups()
    assert host == "127.0.0.1"  # if no address is given
    return lambda: asyncio.open_connection(host, int(port))


async def scrape(open_connection, *, openmetrics=False):
    """Return all samples: values by name and labels."""
    accept = b"Accept: application/openmetrics-text; version=1.0.0\r\n" if openmetrics else b""
    head, body = await exchange(open_connection, SCRAPE % accept)
    assert head.startswith("HTTP/1.1 200 OK")
    assert ("openmetrics" in head) == openmetrics
    families = (parse_openmetrics if openmetrics else parse_text)(body.decode())
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def key(name, /, **labels):
    return (name, *sorted(labels.items()))


def of_port(name, nr, /, **labels):
    return key(name, vm="vring", controller="virtio-serial0", port=str(nr), **labels)


async def status_of(*arguments):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vring_serial", "serve", "--vhost-user", "v"),
        *("--chardev", "null,id=n", "--port", "chardev=n", *arguments),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(TIMEOUT):
        _, said = await process.communicate()
    assert b"Traceback" not in said
    return process.returncode, said.decode()


async def test_what_was_moved_is_scraped_over_tcp_and_unix_and_begins_anew_with_a_worker(tmp_path):
    async with kept(tmp_path, *socket_ports([1, 2]), *METRICS, "--socket-mode", "0660") as keeper:
        await keeper.logged("metrics at unix:m")
        assert stat.S_IMODE(Path("m").stat().st_mode) == 0o660
        tcp = at_tcp(keeper.log)
        async with EmbeddedGuest("v", memory=32 << 20) as guest:
            port = await guest.wait_port(nr=1)
            reader, writer = await asyncio.open_unix_connection("c1")
            await port.wait_host()
            inner, back = await port.open()
            back.write(b"x" * 100_001)
            await reader.readexactly(100_001)
            writer.write(b"y" * 7003)
            await inner.readexactly(7003)
            by_tcp, by_unix = await scrape(tcp), await scrape(at_unix())
            assert by_tcp.keys() == by_unix.keys()
            for found in (by_tcp, by_unix, await scrape(tcp, openmetrics=True)):
                assert found[of_port("vring_port_bytes_total", 1, direction="out")] == 100_001
                assert found[of_port("vring_port_bytes_total", 1, direction="in")] == 7003
                assert found[of_port("vring_port_bytes_total", 2, direction="out")] == 0
                assert found[of_port("vring_port_chains_total", 1, direction="out")] > 0
                assert found[of_port("vring_port_kicks_total", 1, direction="out")] > 0
                assert found[of_port("vring_port_host_connected", 1)] == 1
                assert found[of_port("vring_port_host_connected", 2)] == 0
                assert found[of_port("vring_port_host_connections_total", 1)] == 1
                assert found[of_port("vring_port_guest_open", 1)] == 1
                assert found[key("vring_worker_restarts_total", vm="vring")] == 0
                controller = {"vm": "vring", "controller": "virtio-serial0"}
                assert found[key("vring_frontend_connected", **controller)] == 1
                assert found[key("vring_frontend_connections_total", **controller)] == 1
                name = "org.example.data1"
                info = of_port("vring_port_info", 1, name=name, chardev="c1", kind="port")
                assert found[info] == 1
            writer.close()
            await until_host_left(tcp)
            reader, writer = await asyncio.open_unix_connection("c1")
            await port.wait_host()
            found = await scrape(tcp)
            assert found[of_port("vring_port_host_connections_total", 1)] == 2
            await keeper.kill_until_served()
            found = await scrape(tcp)
            assert found[key("vring_worker_restarts_total", vm="vring")] == 1
            assert found[of_port("vring_port_bytes_total", 1, direction="out")] == 0
            back.write(b"z" * 10)
            await reader.readexactly(10)
            found = await scrape(at_unix())
            assert found[of_port("vring_port_bytes_total", 1, direction="out")] == 10
            back.close()
            writer.close()
        assert await keeper.stop() == 0
    assert not Path("m").exists()


async def until_host_left(open_connection):
    async with asyncio.timeout(TIMEOUT):
        while (await scrape(open_connection))[of_port("vring_port_host_connected", 1)]:
            pass


async def test_another_monitor_serves_metrics_on_at_the_same_address(tmp_path):
    async with kept(tmp_path, *socket_ports([1]), *METRICS) as keeper:
        await keeper.logged("metrics at unix:m")
        tcp = at_tcp(keeper.log)
        assert await scrape(tcp)  # it serves
        os.kill(keeper.monitor, signal.SIGKILL)
        await keeper.logged("metrics at unix:m", 2)
        assert (await scrape(tcp))[key("vring_worker_up", vm="vring")] == 1
        assert (await scrape(at_unix()))[key("vring_worker_restarts_total", vm="vring")] == 0


async def test_promtool_finds_nothing_to_object_to():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    vm = read_vm("a", described())
    process = await asyncio.create_subprocess_exec(
        *(promtool, "check", "metrics"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate(render([vm], "1", openmetrics=False)[0])
    assert (process.returncode, said) == (0, b"")


def test_the_dashboard_shows_every_metric_and_no_other():
    text = DASHBOARD.read_text()
    board = json.loads(text)
    shown = set(re.findall(r"\bvring_[a-z_]+", " ".join(expressions(board["panels"]))))
    families = parse_text(render([read_vm("a", described())], "1", openmetrics=False)[0].decode())
    assert shown == {sample.name for family in families for sample in family.samples}
    assert set(re.findall(r"\bvring_[a-z_]+", text)) == shown


def expressions(panels):
    return [target["expr"] for panel in panels for target in panel["targets"]]


def described():
    flow = dict.fromkeys(("bytes", "chains", "kicks", "calls", "calls_saved", "dropped"), 3)
    flow["throttled_ns"] = 1_500_000_000
    port = {"nr": 1, "name": "n", "chardev": "c", "console": True, "out": flow, "in": flow}
    return {"restarts": 2, "controllers": [{"id": "v", "frontend": True, "ports": [port]}]}


def test_seconds_are_seconds():
    text = render([read_vm("a", described())], "1", openmetrics=False)[0].decode()
    assert re.search(r'^vring_port_throttled_seconds_total\{.*direction="in".*\} 1\.5$', text, re.M)
    assert re.search(r"^vring_port_dropped_bytes_total\{.*\} 3\.0$", text, re.M)


# --- workers that do not answer as they should

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("restarts", "controllers", "ports", "id", "nr", "out", "in", "bytes")),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(st.lists(JSON, max_size=3))
def test_whatever_a_worker_answers_the_text_can_be_parsed(answers):
    vms = [read_vm(f"vm{number}", answer) for number, answer in enumerate(answers)]
    for openmetrics, parse in ((False, parse_text), (True, parse_openmetrics)):
        text = render(vms, "1", openmetrics=openmetrics)[0].decode()
        samples = [s for family in parse(text) for s in family.samples]
        keys = [key(s.name, **s.labels) for s in samples]
        assert len(keys) == len(set(keys))
        assert sum(s.name == "vring_worker_up" for s in samples) == len(answers)


def test_what_is_there_twice_or_too_long_or_no_count_is_bounded():
    port = {"nr": -1, "name": "\ud800" * 1000, "out": {"bytes": True, "chains": 1 << 70}}
    answer = {"restarts": 1e9, "controllers": [{"id": "v", "ports": [port] * 5000}] * 5000}
    vm = read_vm("a", answer)
    (controller,) = vm.controllers
    (found,) = controller.ports
    assert (vm.restarts, found.nr, found.name) == (0, 0, "?" * 256)
    assert (found.out.bytes, found.out.chains, found.back.bytes) == (0, 0, 0)


def test_a_vm_has_no_more_ports_than_can_be_written_down_soon():
    ports = [{"nr": nr} for nr in range(1500)]
    answer = {"restarts": 0, "controllers": [{"id": str(n), "ports": ports} for n in range(4)]}
    found = [len(controller.ports) for controller in read_vm("a", answer).controllers]
    assert found == [1500, 548, 0, 0]


# --- scrapers that do not ask as they should


@asynccontextmanager
async def served(describe, confined=None):
    """Serve metrics at the path ``m`` from a worker that describes itself so; yield the calls."""
    calls = []
    if confined is None:
        confined = asyncio.Event()
        confined.set()

    def answer():
        calls.append(None)
        return describe()

    mine, its = make_link()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("m")
        listening.listen(64)
        listening.setblocking(False)
        with (
            Vm("a", mine, lambda *_: None) as vm,
            Answerer(its, {"describe": answer}, "the monitor"),
        ):
            async with (
                Readings([vm], "1") as readings,
                MetricsServer(readings, listening, "metrics", confined) as server,
            ):
                await server.start()
                yield calls


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "404 Not Found"),
        (b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx", "405 Method"),
        (b"nonsense\r\n\r\n", "400 Bad Request"),
        (b"\0" * 100_000, "400 Bad Request"),
        (b"GET /metrics HTTP/1.1\r\nA: " + b"a" * 100_000, "431 Request Header"),
        (b"HEAD /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n", "200 OK"),
        (b"GET /metrics HTTP/1.0\r\n\r\n", "200 OK"),
        (SCRAPE % b"Accept: application/openmetrics-text;version=\xff\xfe;q=x\r\n", "200 OK"),
    ],
)
async def test_each_request_gets_its_answer(request_bytes, status):
    async with served(described):
        head, body = await exchange(at_unix(), request_bytes)
        assert head.startswith(f"HTTP/1.1 {status}")
        assert bool(body) == (not request_bytes.startswith(b"HEAD"))
        assert await scrape(at_unix())


async def test_one_that_asks_for_nothing_and_one_that_reads_nothing_are_sent_away(monkeypatch):
    monkeypatch.setattr(metrics_server, "REQUEST_SECONDS", 0.05)
    monkeypatch.setattr(metrics_server, "READ_SECONDS", 0.05)

    def long():
        flow = described()["controllers"][0]["ports"][0]["out"]
        ports = [{"nr": nr, "name": "n" * 200, "out": flow, "in": flow} for nr in range(500)]
        return {"restarts": 0, "controllers": [{"id": "v", "ports": ports}]}

    async with served(long), asyncio.timeout(TIMEOUT):
        silent, writer = await asyncio.open_unix_connection("m")
        with suppress(ConnectionError):
            assert await silent.read() == b""
        writer.close()
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.setblocking(False)
            await asyncio.get_running_loop().sock_connect(deaf, "m")
            deaf.send(SCRAPE % b"")
            (text, _) = render([read_vm("a", long())], "1", openmetrics=False)
            await until(lambda: hung_up(deaf))
            got = 0
            with suppress(ConnectionError):
                while data := deaf.recv(1 << 20):
                    got += len(data)
            assert got < len(text)


def hung_up(sock):
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))


async def test_too_many_are_sent_away_and_those_who_are_there_are_served():
    async with served(described), asyncio.timeout(TIMEOUT):
        idle = [await asyncio.open_unix_connection("m") for _ in range(metrics_server.CLIENTS_MAX)]
        reader, writer = await asyncio.open_unix_connection("m")
        with suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        reader, writer = idle[0]
        writer.write(SCRAPE % b"")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK")
        for _, writer in idle:
            writer.close()


async def test_a_flood_of_scrapes_asks_the_worker_once_a_round(monkeypatch):
    monkeypatch.setattr(metrics_server, "ROUND_SECONDS", 3600.0)
    async with served(described) as calls:
        assert await scrape(at_unix())
        waiting = [asyncio.create_task(scrape(at_unix())) for _ in range(10)]
        await asyncio.sleep(0.1)
        assert len(calls) == 1
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    Path("m").unlink()
    monkeypatch.setattr(metrics_server, "ROUND_SECONDS", 0.2)
    async with served(described) as calls:
        began = asyncio.get_running_loop().time()
        await asyncio.gather(*(scrape(at_unix()) for _ in range(10)))
        await asyncio.gather(*(scrape(at_unix()) for _ in range(10)))
        rounds = (asyncio.get_running_loop().time() - began) / 0.2
        assert 2 <= len(calls) <= rounds + 1


async def test_nothing_is_read_before_the_process_is_confined():
    confined = asyncio.Event()
    async with served(described, confined):
        answered = asyncio.create_task(exchange(at_unix(), b"nonsense\r\n\r\n"))
        await asyncio.sleep(0.05)
        assert not answered.done()
        confined.set()
        assert (await answered)[0].startswith("HTTP/1.1 400")


async def test_a_worker_that_does_not_answer_is_down(monkeypatch):
    monkeypatch.setattr(metrics_server, "ANSWER_SECONDS", 0.05)
    async with served(lambda: asyncio.sleep(3600)):
        found = await scrape(at_unix())
        assert found[key("vring_worker_up", vm="a")] == 0
        assert not any("port" in name for name, *_ in found)


# --- the option


@pytest.mark.parametrize(
    ("text", "host", "port", "path"),
    [
        ("9500", "127.0.0.1", 9500, None),
        ("0.0.0.0:9500", "0.0.0.0", 9500, None),
        ("localhost:0", "localhost", 0, None),
        ("[::1]:9500", "::1", 9500, None),
        ("unix:/run/a:b", "", None, "/run/a:b"),
    ],
)
def test_addresses(text, host, port, path):
    options = parse_metrics(text, "--metrics")
    assert (options.host, options.port, options.path or None) == (host, port, path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is [ADDR:]PORT or unix:PATH; port: '' is not a number"),
        ("65536", "port: 65536 is not from 0 to 65535"),
        ("-1", "'-1' is not a number"),
        ("host:x", "port: 'x' is not a number"),
        (":9500", "a port alone is one of 127.0.0.1"),
        ("::1:9500", "an IPv6 address is written in brackets, as in [::1]:9500"),
        ("[::1]", "an IPv6 address is written in brackets"),
        ("unix:", "unix: needs a path"),
        ("http://a:9500", "an IPv6 address"),
    ],
)
def test_what_is_no_address_is_refused(text, why):
    with pytest.raises(ConfigError) as caught:
        parse_metrics(text, "--metrics")
    assert caught.value.where.startswith("--metrics")
    assert why in caught.value.why


async def test_errors_are_one_line_with_the_exit_status_of_their_kind():
    status, said = await status_of("--metrics", "65536")
    assert (status, said) == (2, "vring: --metrics 65536: port: 65536 is not from 0 to 65535\n")
    status, said = await status_of("--no-keeper", "--metrics", "0")
    assert status == 2
    assert "--metrics needs the keeper" in said
    status, said = await status_of("--no-keeper", "--workers", "shared")
    assert status == 2
    assert "--workers needs the keeper" in said
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, said = await status_of("--metrics", str(port))
    assert status == 1
    assert said.count(f"--metrics tcp:127.0.0.1:{port}: Address already in use") == 1
    Path("file").touch()
    status, said = await status_of("--metrics", "unix:file")
    assert status == 1
    assert said.count("--metrics: file: exists and is not a socket") == 1


@pytest.mark.parametrize("module", ["prometheus_client", "h11"])
async def test_a_library_that_is_missing_is_named(module):
    code = (
        f"import sys; sys.modules[{module!r}] = None; from vring_serial.__main__ import main; "
        "sys.argv = ['vring', 'serve', '--vhost-user', 'v', '--chardev', 'null,id=n', "
        "'--port', 'chardev=n', '--metrics', '0']; main()"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code), stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(TIMEOUT):
        _, said = await process.communicate()
    assert process.returncode == 1
    assert said.decode() == (
        f"vring: --metrics needs {module}, which is not installed: pip install 'vring[metrics]'\n"
    )
