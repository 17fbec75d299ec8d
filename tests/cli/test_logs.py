from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.waiting import wait_until
from vring_serial.agent.events import AgentGone, AgentReady
from vring_serial.chardev.protocol import SpicevmcOptions
from vring_serial.cli import agent_end, logs
from vring_serial.config.topology import ChardevConfig, PortConfig
from vring_serial.device.console.event_log import EventLog
from vring_serial.device.console.events import DeviceEvent, MessageRefused, PortOpened, Side
from vring_serial.proto.agent import Capabilities


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Logging as it was before the test."""
    root, ours = logging.getLogger(), logging.getLogger("vring_serial")
    before = root.handlers[:], root.level, ours.level, logging.raiseExceptions
    yield
    root.handlers[:], level, our_level, logging.raiseExceptions = before
    root.setLevel(level)
    ours.setLevel(our_level)


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    made = logging.getLogger("x").makeRecord(
        "vring_serial.x", logging.INFO, "file", 1, message, args, None, extra=extra
    )
    made.created = 0.25
    return made


class Kept(logging.Handler):
    """Keeps records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def event_record(where: str, event: DeviceEvent) -> logging.LogRecord:
    """What a device logs of an event."""
    kept, logger = Kept(), logging.getLogger("vring_serial")
    logger.setLevel(logging.INFO)
    logger.addHandler(kept)
    EventLog().write(where, event)
    logger.removeHandler(kept)
    (made,) = kept.records
    made.created = 0.25
    return made


def as_json(made: logging.LogRecord) -> dict[str, object]:
    line = logs.JsonFormatter().format(made)
    assert "\n" not in line
    parsed = json.loads(line)
    assert isinstance(parsed, dict)
    return parsed


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on standard error, when all are there."""
    logging.getLogger().handlers[0].flush()
    return capsys.readouterr().err.splitlines()


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", as_json=False)
    logs.emit(logging.INFO, "serving", "100 % serving", pid=1)
    (line,) = printed(capsys)
    assert line.endswith(" info    100 % serving")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", as_json=True)
    logs.emit(logging.WARNING, "serving", "serving", pid=1)
    (line,) = printed(capsys)
    parsed = json.loads(line)
    assert parsed.pop("time").endswith("Z")
    assert parsed == {
        "level": "warning",
        "logger": "vring_serial.cli",
        "event": "serving",
        "message": "serving",
        "pid": 1,
    }


def test_device_events_are_named_and_have_their_fields() -> None:
    assert as_json(event_record("virtio-serial0: port 1", PortOpened(Side.GUEST, 1))) == {
        "time": "1970-01-01T00:00:00.250Z",
        "level": "info",
        "logger": "vring_serial.device.console.event_log",
        "event": "port_opened",
        "message": "virtio-serial0: port 1: opened by the guest",
        "where": "virtio-serial0: port 1",
        "side": "guest",
        "nr": 1,
    }
    refused = as_json(event_record("virtio-serial0", MessageRefused("no port 7")))
    assert (refused["event"], refused["why"]) == ("message_refused", "no port 7")


def test_other_records_are_logs() -> None:
    assert as_json(record("%s and %d", "one", 2))["event"] == "log"
    assert as_json(record("no arguments"))["event"] == "log"


@pytest.mark.parametrize(
    ("level", "shown"),
    [("debug", "DIWE"), ("info", "IWE"), ("warning", "WE"), ("error", "E")],
)
def test_levels(capsys: pytest.CaptureFixture[str], level: str, shown: str) -> None:
    logs.configure(level, as_json=False)
    for letter in ("DEBUG", "INFO", "WARNING", "ERROR"):
        logs.emit(getattr(logging, letter), "x", letter[0])
    assert "".join(line[-1] for line in printed(capsys)) == shown


def test_others_are_heard_from_warnings_on(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("debug", as_json=False)
    logging.getLogger("asyncio").info("Using selector")
    logging.getLogger("asyncio").warning("slow callback")
    (line,) = printed(capsys)
    assert line.endswith("warning slow callback")


@pytest.mark.parametrize("as_json", [False, True])
def test_exceptions(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    """One line, with the traceback only where it was asked for."""
    logs.configure("info", as_json=as_json)
    try:
        raise OSError(5, "I/O error")
    except OSError:
        logging.getLogger("vring_serial.x").exception("it broke")
    (line,) = printed(capsys)
    if as_json:
        assert "Traceback" in json.loads(line)["exception"]
    else:
        assert line.endswith("error   it broke: OSError: [Errno 5] I/O error")


@given(st.text())
def test_no_message_breaks_the_line(text: str) -> None:
    line = logs.TextFormatter().format(record("%s", text))
    assert line.isprintable()
    assert as_json(record("%s", text))["message"] == text


def test_a_closed_stderr_does_not_stop_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.configure("info", as_json=False)
    stream.close()
    logs.emit(logging.INFO, "x", "into the void")
    logging.getLogger().handlers[0].flush()


def test_an_agent_that_comes_and_goes_in_a_loop_fills_no_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "vring_serial")
    port = PortConfig(1, "com.redhat.spice.0", ChardevConfig("spicevmc", "a", SpicevmcOptions()))
    on_event = agent_end.logger_of(port)
    for _ in range(1000):
        on_event(AgentReady(Capabilities.of(0)))
        on_event(AgentGone("bad chunk"))
    assert len(caplog.records) == 20
    line = json.loads(logs.JsonFormatter().format(caplog.records[1]))
    assert (line["event"], line["nr"], line["reason"]) == ("agent_gone", 1, "bad chunk")
    assert line["message"] == "agent of port 1: gone: bad chunk"


def test_an_agent_of_many_capabilities_has_them_cut(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vring_serial")
    port = PortConfig(1, "com.redhat.spice.0", ChardevConfig("spicevmc", "a", SpicevmcOptions()))
    agent_end.logger_of(port)(AgentReady(Capabilities.of(*range(2048))))
    (one,) = caplog.records
    assert one.getMessage().endswith(" (2008 more)")
    assert len(one.getMessage()) < 1500
    assert len(json.loads(logs.JsonFormatter().format(one))["capabilities"]) == 41


def test_what_peers_can_cause_has_one_budget_and_the_service_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "BURST_BYTES", 10_000)
    monkeypatch.setattr(logs, "RESUME_BYTES", 1000)
    path = tmp_path / "log"
    logs.configure("info", as_json=True, path=str(path))
    handler = logging.getLogger().handlers[0]
    assert isinstance(handler, logs.LineHandler)
    for number in range(10_000):
        logging.getLogger(f"vring_serial.kind{number % 7}").warning("%s", "x" * 50)
    logs.emit(logging.INFO, "stopping", "stopping")
    handler.flush()
    lines = path.read_text().splitlines()
    assert 9_000 < sum(map(len, lines[:-1])) < 11_000
    assert json.loads(lines[-1])["event"] == "stopping"
    # As much is saved up as is needed to go on, and what is missing is told.
    tried = 0

    def goes_on() -> bool:
        nonlocal tried
        tried += 1
        logging.getLogger("vring_serial.kind").warning("again")
        handler.flush()
        return "again" in path.read_text()

    wait_until(goes_on)
    told, again = map(json.loads, path.read_text().splitlines()[-2:])
    assert again["message"] == "again"
    assert (told["event"], told["count"]) == ("log_left_out", 10_000 - len(lines) + tried)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_long_message_is_cut_with_a_count(as_json: bool) -> None:
    formatter = logs.JsonFormatter() if as_json else logs.TextFormatter()
    line = formatter.format(event_record("w", MessageRefused("x" * 1_000_000)))
    assert len(line) < 9000
    assert "more characters)" in line
