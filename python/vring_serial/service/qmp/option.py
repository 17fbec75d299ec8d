"""The option ``--qmp``, in QEMU's syntax: where a monitor listens."""

from __future__ import annotations

import ipaddress

from vring_serial.chardev.socket import SocketOptions
from vring_serial.config.qemu_options import split
from vring_serial.config.words import parse_bool, parse_int, shorten, suggest
from vring_serial.errors import ConfigError

_KEYS = ("server", "wait")


def parse_qmp(text: str, where: str) -> SocketOptions:
    """Parse ``unix:PATH,server=on,wait=off`` or ``tcp:[HOST]:PORT,…``.

    A monitor listens, waits for nobody, and over TCP is for this machine alone: QMP knows no
    passwords.

    Raises ConfigError, which names ``where`` the option is.
    """
    try:
        (address, none), *pairs = split(text)
        if none is not None:
            raise ConfigError("begins with unix:PATH or tcp:HOST:PORT")
        options = _options(address)
        given = {key: _switch(key, value) for key, value in pairs}
        if not given.get("server"):
            raise ConfigError("needs server=on: a monitor listens")
        if given.get("wait"):
            raise ConfigError("wait=on is not served: devices do not wait for a monitor")
        return options
    except ConfigError as error:
        raise ConfigError(error.why, where) from None


def _switch(key: str, value: str | None) -> bool:
    if key.startswith("no") and value is None:
        key, value = key[2:], "off"
    if key not in _KEYS:
        raise ConfigError(f"there is no {shorten(key)}; {suggest(key, _KEYS)}")
    try:
        return parse_bool("on" if value is None else value)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def _options(address: str) -> SocketOptions:
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest:
        return SocketOptions(path=rest, server=True, wait=False)
    host, colon, port = rest.rpartition(":")
    if kind != "tcp" or not colon:
        raise ConfigError("begins with unix:PATH or tcp:HOST:PORT")
    host = host.strip("[]") or "127.0.0.1"
    if host != "localhost":
        try:
            loopback = ipaddress.ip_address(host).is_loopback
        except ValueError:
            loopback = False
        if not loopback:
            raise ConfigError(
                f"{host} is not this machine: QMP has no passwords, give 127.0.0.1, [::1] or a path"
            )
    try:
        return SocketOptions(host=host, port=parse_int(port), server=True, wait=False)
    except ValueError as error:
        raise ConfigError(f"port: {error}") from None
