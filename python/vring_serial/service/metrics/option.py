"""The option ``--metrics``: where metrics are served."""

from __future__ import annotations

from vring_serial.chardev.socket import SocketOptions
from vring_serial.config.words import parse_int
from vring_serial.errors import ConfigError, DependencyError

_SYNTAX = "is [ADDR:]PORT or unix:PATH"
_LOOPBACK = "127.0.0.1"


def parse_metrics(text: str, where: str) -> SocketOptions:
    """Parse ``PORT``, ``ADDR:PORT``, ``[IPV6]:PORT`` or ``unix:PATH``.

    A port alone is one of 127.0.0.1. Port 0 lets the system choose.

    Raises ConfigError, which names ``where`` the option is.
    """
    try:
        if text.startswith("unix:"):
            if not (path := text.removeprefix("unix:")):
                raise ConfigError("unix: needs a path")
            return SocketOptions(path=path, server=True, wait=False)
        address, colon, port = text.rpartition(":")
        host = _host(address) if colon else _LOOPBACK
        try:
            number = parse_int(port)
        except ValueError as error:
            raise ConfigError(f"{_SYNTAX}; port: {error}") from None
        if not 0 <= number <= 65535:
            raise ConfigError(f"port: {number} is not from 0 to 65535")
        return SocketOptions(host=host, port=number, server=True, wait=False)
    except ConfigError as error:
        raise ConfigError(error.why, where) from None


def check_libraries() -> None:
    """Check that metrics can be served. Raises DependencyError."""
    try:
        import h11  # noqa: F401
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            f"--metrics needs {error.name}, which is not installed: pip install 'vring[metrics]'"
        ) from None


def _host(address: str) -> str:
    if address.startswith("[") and address.endswith("]") and ":" in address:
        return address[1:-1]
    if ":" in address:
        raise ConfigError("an IPv6 address is written in brackets, as in [::1]:9500")
    if not address or "/" in address:
        raise ConfigError(
            f"{_SYNTAX}; a port alone is one of {_LOOPBACK}, and 0.0.0.0 is every address"
        )
    return address
