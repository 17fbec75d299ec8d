"""The SPICE server: libspice-server on the running loop, its clients, and our ports in it."""

from __future__ import annotations

import logging
import os
import socket
import ssl
from collections.abc import Callable
from typing import Any

from vring_serial.accept import Acceptor
from vring_serial.errors import ConfigError, LocalProtocolError, ResourceError
from vring_serial.lifetime import Starting
from vring_serial.spice.core import ClientEvent, CoreInterface
from vring_serial.spice.device import AgentChardev, AgentDevice, CharDevice, PortChardev
from vring_serial.spice.library import load
from vring_serial.spice.listener import Listener, bind, bind_first_free, is_local
from vring_serial.spice.options import SpiceOptions

log = logging.getLogger("vring_serial.spice")

_ADDR_IPV4_ONLY = 1 << 0
_ADDR_IPV6_ONLY = 1 << 1
_SECURITY_NONE = 1 << 0
_SECURITY_SSL = 1 << 1


class SpiceServer(Starting):
    """One SPICE server, for stock clients.

    The ports that it serves are made with :meth:`agent_chardev` and :meth:`port_chardev`, before or
    after :meth:`start`, and given to a controller, which starts and stops them; the server is
    started before them and stopped after them.

    Args:
        options: where and how.
        name: of the machine, for clients.
        on_client: told when a client comes or goes, in the loop's thread.

    Attributes:
        library: libspice-server.
        handle: the library's server while it runs, else None.
        devices: the char devices that the server has now.
        addresses: where it listens, as text.

    Raises:
        DependencyError: the library is not installed; the message names the package.
    """

    def __init__(
        self,
        options: SpiceOptions,
        *,
        name: str = "vring",
        on_client: Callable[[ClientEvent], None] | None = None,
    ) -> None:
        self.library = load()
        self.handle: Any = None
        self.devices: set[CharDevice] = set()
        self.addresses: list[str] = []
        self._options = options
        self._name = name
        self._on_client = on_client or (lambda event: None)
        self._core: CoreInterface | None = None
        self._listener: Listener | None = None
        self._acceptor: Acceptor | None = None
        self._tls_port = 0

    @property
    def unauthenticated(self) -> int:
        """Connections that have not authenticated: at most UNAUTHENTICATED_MAX, none for long."""
        return self._core.admission.waiting if self._core is not None else 0

    def agent_chardev(self, id: str) -> AgentChardev:
        """Return the host end of the agent channel; a server has one agent."""
        return AgentChardev(id, self)

    def agent_device(self) -> AgentDevice:
        """Return the server's end of a shared agent channel, for AgentRouter.connect_server."""
        return AgentDevice(self)

    def port_chardev(self, id: str, name: str) -> PortChardev:
        """Return the host end of a port channel that clients know as ``name``."""
        return PortChardev(id, self, name)

    async def start(self) -> None:
        """Listen, and serve clients from now on.

        Raises:
            ConfigError: the password or a certificate cannot be used.
            ResourceError: an address or a file cannot be had, or the library refuses.
            LocalProtocolError: it runs already.
        """
        if self.handle is not None:
            raise LocalProtocolError("the SPICE server runs already")
        password = self._options.read_password()
        self._listener = Listener(self._options)
        try:
            reachable = not all(map(is_local, self._listener.sockets))
            if self._options.has_tls:
                reachable |= self._check_tls()
            self._init(password)
            self._acceptor = Acceptor(self._accepted, name="SPICE", peer="client", yields=True)
            self._acceptor.open(self._listener.sockets)
        except BaseException:
            await self.aclose()
            raise
        self.addresses = list(self._listener.addresses)
        if self._options.has_tls:
            self.addresses.append(f"{self._options.addr or '*'}:{self._tls_port} (TLS)")
        if password is None and reachable:
            log.warning(
                "SPICE: no password is needed at %s: whoever reaches it over the network reaches "
                "the guest's clipboard and files",
                ", ".join(self.addresses),
            )

    async def aclose(self) -> None:
        """Disconnect clients and forget the server. Safe twice, and after a failed start."""
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for device in list(self.devices):
            device.detach()
        if self.handle is not None:
            handle, self.handle = self.handle, None
            self.library.lib.spice_server_destroy(handle)
        if self._core is not None:
            # The library knows nothing any more of clients that had not proved themselves yet.
            for fd in self._core.close():
                os.close(fd)
            self._core = None

    def _init(self, password: bytes | None) -> None:
        options, ffi, lib = self._options, self.library.ffi, self.library.lib
        self._core = CoreInterface(self.library, self._on_client)
        self.handle = handle = lib.spice_server_new()
        lib.spice_server_set_name(handle, self._name.encode(errors="replace"))
        if password is None:
            lib.spice_server_set_noauth(handle)
        else:
            lifetime = options.password_lifetime()
            # The library lets nobody in while it has no ticket, which is not the same as noauth.
            ticket = password if password and lifetime >= 0 else ffi.NULL
            if lib.spice_server_set_ticket(handle, ticket, max(lifetime, 0), 0, 0) != 0:
                raise ResourceError("the SPICE server refused the password")
        lib.spice_server_set_agent_mouse(handle, options.agent_mouse)
        lib.spice_server_set_agent_copypaste(handle, not options.disable_copy_paste)
        lib.spice_server_set_agent_file_xfer(handle, not options.disable_agent_file_xfer)
        if options.has_tls:
            self._set_tls()
        for names, security in (
            (options.tls_channel, _SECURITY_SSL),
            (options.plaintext_channel, _SECURITY_NONE),
        ):
            for name in names:
                channel = ffi.NULL if name == "default" else name.encode()
                if lib.spice_server_set_channel_security(handle, channel, security) != 0:
                    raise ConfigError(f"the SPICE server has no channel {name}")
        self.library.last_warning[0] = "the library does not start, and says no reason"
        if lib.spice_server_init(handle, self._core.struct) != 0:
            raise ResourceError(f"SPICE: {self.library.last_warning[0]}")

    def _set_tls(self) -> None:
        """Have the library listen for TLS itself, at the same address."""
        options, ffi, lib = self._options, self.library.ffi, self.library.lib
        flags = _ADDR_IPV4_ONLY if options.ipv4 else _ADDR_IPV6_ONLY if options.ipv6 else 0
        lib.spice_server_set_addr(self.handle, os.fsencode(options.addr), flags)
        optional = (options.x509_key_password, options.x509_dh_key_file, options.tls_ciphers)
        lib.spice_server_set_tls(
            self.handle,
            self._tls_port,
            *map(os.fsencode, (options.cacert_file, options.cert_file, options.key_file)),
            *(os.fsencode(text) if text else ffi.NULL for text in optional),
        )

    def _check_tls(self) -> bool:
        """Check what the library would refuse with less of an explanation, and choose the port.

        Returns:
            Whether other machines can reach the port.
        """
        options = self._options
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for key, path, load_file in (
            ("x509-cacert-file", options.cacert_file, context.load_verify_locations),
            ("x509-cert-file", options.cert_file, None),
            ("x509-key-file", options.key_file, None),
        ):
            try:
                with open(path, "rb"):
                    pass
                if load_file is not None:
                    load_file(path)
            except ssl.SSLError:
                raise ConfigError(f"{path} holds no certificate", key) from None
            except OSError as error:
                raise ResourceError(f"{key} {path}: {error.strerror}") from None
        try:
            context.load_cert_chain(
                options.cert_file, options.key_file, lambda: options.x509_key_password
            )
        except ssl.SSLError as error:
            why = (error.reason or "not usable").lower().replace("_", " ")
            raise ConfigError(f"{options.cert_file} with {options.key_file}: {why}") from None
        if options.tls_ciphers:
            try:
                context.set_ciphers(options.tls_ciphers)
            except ssl.SSLError:
                raise ConfigError(
                    f"{options.tls_ciphers!r} names no cipher", "tls-ciphers"
                ) from None
        if options.tls_autoport:
            bound = bind_first_free(options, options.tls_port, but=options.port)
        else:
            bound = bind(options, options.tls_port)
        self._tls_port = bound[0].getsockname()[1]
        reachable = not all(map(is_local, bound))
        for sock in bound:
            sock.close()  # the library binds it, and would not say what is wrong
        return reachable

    def _accepted(self, client: socket.socket) -> None:
        assert self._core is not None
        fd = client.detach()
        with self._core.accepting():
            if self.library.lib.spice_server_add_client(self.handle, fd, 0) != 0:
                os.close(fd)
