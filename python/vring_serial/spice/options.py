"""Options of the SPICE server, named as QEMU's ``-spice`` names them."""

from __future__ import annotations

import dataclasses
import os
import time

from vring_serial.chardev.options import Options, check_path, check_range
from vring_serial.errors import ConfigError, ResourceError
from vring_serial.unix_socket import MAX_PATH

#: The longest password in bytes: the library takes SPICE_MAX_PASSWORD_LENGTH, which is 60, and cuts
#: the last of them off.
MAX_PASSWORD = 59
#: The longest time that the library takes for a password's life, in seconds: an int, and room.
MAX_LIFETIME = 2**30
#: Where the library keeps an address and the paths of certificates, less the NUL.
MAX_ADDRESS = 255
#: Channels that may be told to use TLS or not; ``default`` is all that are not named.
CHANNELS = (
    *("main", "display", "inputs", "cursor", "playback", "record"),
    *("smartcard", "usbredir", "default"),
)
#: Keys of QEMU's ``-spice`` that are known and not served, each with the reason.
_NO_DISPLAY = "there is no display here, only the agent and ports"
UNSERVED_KEYS = {
    "display": _NO_DISPLAY,
    "gl": _NO_DISPLAY,
    "head": _NO_DISPLAY,
    "image-compression": _NO_DISPLAY,
    "jpeg-wan-compression": _NO_DISPLAY,
    "max-refresh-rate": _NO_DISPLAY,
    "password-secret": "use password-file",
    "playback-compression": "there is no sound here, only the agent and ports",
    "rendernode": _NO_DISPLAY,
    "sasl": "use password-file, or a unix socket",
    "seamless-migration": "there is no machine here to migrate",
    "streaming-video": _NO_DISPLAY,
    "video-codecs": _NO_DISPLAY,
    "zlib-glz-wan-compression": _NO_DISPLAY,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SpiceOptions(Options):
    """Where clients connect, how they prove themselves, and what they may do.

    Attributes:
        port: TCP port without TLS; 0 for none.
        autoport: take the first free TCP port from ``port``, or from 5900 if that is 0.
        tls_port: TCP port with TLS; 0 for none.
        tls_autoport: take the first free TCP port from ``tls_port``, or from 5900 if that is 0.
        addr: address to listen on, or the socket's path with ``unix``; empty for every address.
        ipv4, ipv6: listen on addresses of that family alone.
        unix: listen on a unix socket.
        password: what clients have to know; at most MAX_PASSWORD bytes. An empty password lets
            nobody in, as in libvirt; None is no password at all.
        password_file: a file that holds it, and at most a newline after it.
        password_valid_to: when the password expires, in seconds since 1970; 0 for never.
        disable_ticketing: let clients in without a password.
        disable_copy_paste: keep clipboards from passing.
        disable_agent_file_xfer: keep files from passing.
        agent_mouse: give the agent the client's pointer.
        x509_dir: directory of ``server-key.pem``, ``server-cert.pem`` and ``ca-cert.pem``.
        x509_key_file, x509_cert_file, x509_cacert_file: these files, if they are elsewhere.
        x509_key_password: of the key file.
        x509_dh_key_file: Diffie-Hellman parameters.
        tls_ciphers: OpenSSL's list of ciphers.
        tls_channel, plaintext_channel: channels that must, or must not, use TLS.
    """

    port: int = 0
    autoport: bool = False
    tls_port: int = 0
    tls_autoport: bool = False
    addr: str = ""
    ipv4: bool = False
    ipv6: bool = False
    unix: bool = False
    password: str | None = dataclasses.field(default=None, repr=False)
    password_file: str = ""
    password_valid_to: int = 0
    disable_ticketing: bool = False
    disable_copy_paste: bool = False
    disable_agent_file_xfer: bool = False
    agent_mouse: bool = True
    x509_dir: str = "."
    x509_key_file: str = ""
    x509_cert_file: str = ""
    x509_cacert_file: str = ""
    x509_key_password: str = dataclasses.field(default="", repr=False)
    x509_dh_key_file: str = ""
    tls_ciphers: str = ""
    tls_channel: tuple[str, ...] = ()
    plaintext_channel: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_address()
        self._check_password()
        self._check_tls()

    def _check_address(self) -> None:
        check_range("port", self.port, 0, 65535)
        check_range("tls-port", self.tls_port, 0, 65535)
        if "\0" in self.addr:
            raise ConfigError(f"{self.addr!r} contains a NUL character", "addr")
        if self.ipv4 + self.ipv6 + self.unix > 1:
            raise ConfigError("ipv4, ipv6 and unix exclude one another")
        if self.unix:
            check_path("addr", self.addr)
            if len(os.fsencode(self.addr)) > MAX_PATH:
                raise ConfigError(f"a unix socket's path has at most {MAX_PATH} bytes", "addr")
            for key, given in (
                ("port", self.port),
                ("autoport", self.autoport),
                ("tls-port", self.tls_port),
                ("tls-autoport", self.tls_autoport),
            ):
                if given:
                    raise ConfigError("a unix socket has no port", key)
        else:
            if len(self.addr.encode(errors="surrogateescape")) > MAX_ADDRESS:
                raise ConfigError(f"longer than {MAX_ADDRESS} bytes", "addr")
            if not (self.port or self.autoport or self.has_tls):
                raise ConfigError("needs port=, tls-port=, autoport=on, or unix=on,addr=PATH")
            if self.port and self.port == self.tls_port:
                raise ConfigError(f"{self.port} is the port without TLS already", "tls-port")

    def _check_password(self) -> None:
        given = [
            key
            for key, value in (
                ("password", self.password is not None),
                ("password-file", self.password_file),
                ("disable-ticketing", self.disable_ticketing),
            )
            if value
        ]
        if not given:
            raise ConfigError(
                "nobody could connect: needs password-file=FILE, or disable-ticketing=on"
            )
        if len(given) > 1:
            raise ConfigError(f"{given[0]} and {given[1]} exclude each other")
        if self.password:
            check_password("password", self.password.encode(errors="surrogateescape"))
        if self.password_file:
            check_path("password-file", self.password_file)
        check_range("password-valid-to", self.password_valid_to, 0, 2**63 - 1)
        if self.password_valid_to and self.disable_ticketing:
            raise ConfigError("there is no password that could expire", "password-valid-to")

    def _check_tls(self) -> None:
        for key in ("x509-dir", "x509-key-file", "x509-cert-file", "x509-cacert-file"):
            value = getattr(self, key.replace("-", "_"))
            if value:
                check_path(key, value)
        if self.x509_dh_key_file:
            check_path("x509-dh-key-file", self.x509_dh_key_file)
        if self.tls_channel and not self.has_tls:
            raise ConfigError("needs tls-port=", "tls-channel")
        for key, names in (
            ("tls-channel", self.tls_channel),
            ("plaintext-channel", self.plaintext_channel),
        ):
            for name in names:
                if name not in CHANNELS:
                    raise ConfigError(f"no such channel; known: {', '.join(CHANNELS)}", key)
        both = sorted(set(self.tls_channel) & set(self.plaintext_channel))
        if both:
            raise ConfigError(f"{both[0]} is a tls-channel already", "plaintext-channel")

    @property
    def has_tls(self) -> bool:
        """Whether the server listens with TLS."""
        return self.tls_autoport or self.tls_port != 0

    @property
    def key_file(self) -> str:
        """The server's private key."""
        return self.x509_key_file or os.path.join(self.x509_dir, "server-key.pem")

    @property
    def cert_file(self) -> str:
        """The server's certificate."""
        return self.x509_cert_file or os.path.join(self.x509_dir, "server-cert.pem")

    @property
    def cacert_file(self) -> str:
        """The certificate of who signed it."""
        return self.x509_cacert_file or os.path.join(self.x509_dir, "ca-cert.pem")

    def read_password(self) -> bytes | None:
        """Return the password; None if clients need none, empty if nobody may come in.

        Raises:
            ResourceError: the file cannot be read.
            ConfigError: it holds no password, or one that the protocol cannot carry.
        """
        if self.disable_ticketing:
            return None
        if not self.password_file:
            assert self.password is not None
            return self.password.encode(errors="surrogateescape")
        try:
            with open(self.password_file, "rb") as file:
                text = file.read(MAX_PASSWORD + 3)
        except OSError as error:
            raise ResourceError(
                f"password-file {self.password_file}: {error.strerror or error}"
            ) from None
        password = text.removesuffix(b"\n").removesuffix(b"\r")
        check_password(f"password-file {self.password_file}", password)
        return password

    def password_lifetime(self) -> int:
        """Seconds until the password expires, as the library takes them: 0 for never.

        It is negative if the password has expired already.
        """
        if not self.password_valid_to:
            return 0
        return min(self.password_valid_to - int(time.time()), MAX_LIFETIME) or -1


def check_password(where: str, password: bytes) -> None:
    """Raise ConfigError for a password that no client could send."""
    if not password:
        raise ConfigError("the password is empty", where)
    if b"\0" in password or b"\n" in password:
        raise ConfigError("a password has neither NUL nor line feed in it", where)
    if len(password) > MAX_PASSWORD:
        raise ConfigError(f"a SPICE password has at most {MAX_PASSWORD} bytes", where)
