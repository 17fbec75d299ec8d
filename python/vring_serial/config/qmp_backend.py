"""Host ends as QMP describes them (``ChardevBackend``), in the words of ``--chardev``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vring_serial.chardev.file import FileOptions
from vring_serial.chardev.log import LogOptions
from vring_serial.chardev.null import NullOptions
from vring_serial.chardev.pipe import PipeOptions
from vring_serial.chardev.pty import PtyOptions
from vring_serial.chardev.ringbuf import RingbufOptions
from vring_serial.chardev.serial import SerialOptions
from vring_serial.chardev.socket import SocketOptions
from vring_serial.chardev.udp import UdpOptions
from vring_serial.config.topology import ChardevConfig
from vring_serial.errors import ConfigError

#: Kinds that are made while the service runs; the others need code that is set up at the start.
KINDS = ("file", "null", "pipe", "pty", "ringbuf", "serial", "socket", "udp")
#: What every kind may have in QEMU, and ours have not.
_NOT_SERVED = ("logtimestamp",)

_NO_LOG = LogOptions()


def option_of(id: str, backend: Mapping[str, Any]) -> str:
    """Return the value of ``--chardev`` for a backend that QMP's schema allows.

    Raises ConfigError, whose text is QEMU's where QEMU has one.
    """
    kind = backend["type"]
    if kind == "memory":
        kind = "ringbuf"
    data = backend.get("data", {})
    if kind not in KINDS:
        raise ConfigError(f"{kind} cannot be made while the service runs")
    for key in _NOT_SERVED:
        if data.get(key):
            raise ConfigError(f"{key} is not served")
    words = [kind, f"id={id}"]
    if kind == "socket" and data.get("server", True):
        if data.get("wait"):
            raise ConfigError("wait is not served while the service runs")
        data = {**data, "server": True, "wait": False}
    for key, value in _pairs(kind, data):
        if isinstance(value, bool):
            value = "on" if value else "off"
        words.append(f"{key}={str(value).replace(',', ',,')}")
    return ",".join(words)


def _pairs(kind: str, data: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if key in _NOT_SERVED:
            continue
        if kind == "file" and key == "out":
            yield "path", value
        elif kind == "file" and key == "in":
            yield "input-path", value
        elif kind in ("pipe", "serial") and key == "device":
            yield "path", value
        elif kind == "socket" and key == "addr":
            yield from _address(value)
        elif kind == "udp" and key == "remote":
            yield from _address(value, ("inet",))
        elif kind == "udp" and key == "local":
            for name, part in _address(value, ("inet",)):
                if name in ("host", "port"):
                    yield {"host": "localaddr", "port": "localport"}[name], part
                elif part:
                    raise ConfigError(f"{name} of a local address is not served")
        elif kind == "socket" and key in ("telnet", "tn3270", "websocket"):
            if value:
                raise ConfigError(f"{key} is not served")
        else:
            yield key, value


def _address(
    address: Mapping[str, Any], kinds: Sequence[str] = ("unix", "inet")
) -> Iterator[tuple[str, Any]]:
    kind, data = address["type"], address["data"]
    if kind not in kinds:
        raise ConfigError(f"sockets of type {kind} are not served")
    for key, value in data.items():
        if key == "numeric" or key.startswith("keep-alive") or key == "mptcp":
            if value:
                raise ConfigError(f"{key} is not served")
        else:
            yield key, value


def backend_of(config: ChardevConfig) -> dict[str, Any]:
    """Return QMP's description of a host end. Raises ConfigError for what it cannot be."""
    if config.mux:
        why = "mux=on cannot be made while the service runs: give it when that starts"
        raise ConfigError(why, config.where)
    match config.options:
        case FileOptions(path=path, append=append, input_path=input_path):
            data: dict[str, Any] = {"out": path, "append": append}
            data |= {"in": input_path} if input_path else {}
        case PipeOptions(path=path) | SerialOptions(path=path):
            data = {"device": path}
        case PtyOptions(path=path):
            data = {"path": path} if path else {}
        case RingbufOptions(size=size):
            data = {"size": size}
        case NullOptions():
            data = {}
        case UdpOptions() as options:
            data = _udp(options)
        case SocketOptions() as options:
            data = _socket(options)
        case _:
            raise ConfigError(f"{config.kind} cannot be made while the service runs", config.where)
    return {"type": config.kind, "data": data | _log(config.log)}


def _log(log: LogOptions) -> dict[str, Any]:
    """Return what is said of a log, without what goes without saying."""
    return {key: value for key, value in asdict(log).items() if value != getattr(_NO_LOG, key)}


def _udp(options: UdpOptions) -> dict[str, Any]:
    remote: dict[str, Any] = {"host": options.host, "port": str(options.port)}
    for name in ("ipv4", "ipv6"):
        if (value := getattr(options, name)) is not None:
            remote[name] = value
    data = {"remote": {"type": "inet", "data": remote}}
    if options.localaddr or options.localport:
        local = {"host": options.localaddr, "port": str(options.localport)}
        data["local"] = {"type": "inet", "data": local}
    return data


def _socket(options: SocketOptions) -> dict[str, Any]:
    if options.path:
        where: dict[str, Any] = {"path": options.path}
        names = ["abstract", "tight"] if options.abstract else []
        kind = "unix"
    else:
        where = {"host": options.host, "port": str(options.port)}
        names = ["to", "ipv4", "ipv6"]
        kind = "inet"
    where |= {name: value for name in names if (value := getattr(options, name)) is not None}
    data = {"addr": {"type": kind, "data": where}, "server": options.server}
    if options.server:
        data["wait"] = False
    if delay := options.reconnect_delay:
        data["reconnect-ms"] = round(delay * 1000)
    if options.nodelay:
        data["nodelay"] = True
    return data
