"""libspice-server itself, loaded at run time, and its log.

What is declared here is the part of the library's C interface that is used, as of 0.14 and later
(<spice.h>: spice-core.h, spice-char.h, spice-server.h); the loader checks that it is all there.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

from vring_serial.errors import DependencyError, ResourceError
from vring_serial.ratelimit import RateLimitedLog

log = logging.getLogger("vring_serial.spice")

SONAME = "libspice-server.so.1"
_GLIB = "libglib-2.0.so.0"

_DECLARATIONS = """
typedef struct SpiceServer SpiceServer;
typedef struct SpiceWatch SpiceWatch;
typedef struct SpiceTimer SpiceTimer;
typedef void (*SpiceWatchFunc)(int fd, int event, void *opaque);
typedef void (*SpiceTimerFunc)(void *opaque);

typedef struct {
    const char *type;
    const char *description;
    uint32_t major_version;
    uint32_t minor_version;
} SpiceBaseInterface;

typedef struct { const SpiceBaseInterface *sif; } SpiceBaseInstance;

struct sockaddr { uint16_t sa_family; char sa_data[14]; };
struct sockaddr_storage { uint16_t ss_family; char ss_padding[118]; unsigned long ss_align; };

typedef struct {
    int connection_id;
    int type;
    int id;
    int flags;
    struct sockaddr laddr;
    struct sockaddr paddr;
    uint32_t llen;
    uint32_t plen;
    struct sockaddr_storage laddr_ext;
    struct sockaddr_storage paddr_ext;
    uint32_t llen_ext;
    uint32_t plen_ext;
} SpiceChannelEventInfo;

typedef struct {
    SpiceBaseInterface base;
    SpiceTimer *(*timer_add)(SpiceTimerFunc func, void *opaque);
    void (*timer_start)(SpiceTimer *timer, uint32_t ms);
    void (*timer_cancel)(SpiceTimer *timer);
    void (*timer_remove)(SpiceTimer *timer);
    SpiceWatch *(*watch_add)(int fd, int event_mask, SpiceWatchFunc func, void *opaque);
    void (*watch_update_mask)(SpiceWatch *watch, int event_mask);
    void (*watch_remove)(SpiceWatch *watch);
    void (*channel_event)(int event, SpiceChannelEventInfo *info);
} SpiceCoreInterface;

typedef struct {
    SpiceBaseInstance base;
    const char *subtype;
    void *st;
    const char *portname;
} SpiceCharDeviceInstance;

typedef struct {
    SpiceBaseInterface base;
    void (*state)(SpiceCharDeviceInstance *sin, int connected);
    int (*write)(SpiceCharDeviceInstance *sin, const uint8_t *buf, int len);
    int (*read)(SpiceCharDeviceInstance *sin, uint8_t *buf, int len);
    void (*event)(SpiceCharDeviceInstance *sin, uint8_t event);
    int flags;
} SpiceCharDeviceInterface;

SpiceServer *spice_server_new(void);
int spice_server_init(SpiceServer *s, SpiceCoreInterface *core);
void spice_server_destroy(SpiceServer *s);
void spice_server_set_addr(SpiceServer *s, const char *addr, int flags);
int spice_server_set_noauth(SpiceServer *s);
int spice_server_set_ticket(SpiceServer *s, const char *passwd, int lifetime,
                            int fail_if_connected, int disconnect_if_connected);
int spice_server_set_tls(SpiceServer *s, int port, const char *ca_cert_file,
                         const char *certs_file, const char *private_key_file,
                         const char *key_passwd, const char *dh_key_file,
                         const char *ciphersuite);
int spice_server_set_channel_security(SpiceServer *s, const char *channel, int security);
int spice_server_set_agent_mouse(SpiceServer *s, int enable);
int spice_server_set_agent_copypaste(SpiceServer *s, int enable);
int spice_server_set_agent_file_xfer(SpiceServer *s, int enable);
void spice_server_set_name(SpiceServer *s, const char *name);
int spice_server_add_client(SpiceServer *s, int socket, int skip_auth);
int spice_server_add_interface(SpiceServer *s, SpiceBaseInstance *sin);
int spice_server_remove_interface(SpiceBaseInstance *sin);
void spice_server_char_device_wakeup(SpiceCharDeviceInstance *sin);
void spice_server_port_event(SpiceCharDeviceInstance *sin, uint8_t event);
"""

_GLIB_DECLARATIONS = """
typedef void (*GLogFunc)(const char *domain, int level, const char *message, void *data);
unsigned int g_log_set_handler(const char *domain, int levels, GLogFunc func, void *data);
"""

#: GLib's log levels, most severe first, and ours.
_LEVELS = (
    (1 << 2, logging.CRITICAL),  # G_LOG_LEVEL_ERROR: GLib ends the process after it
    (1 << 3, logging.ERROR),
    (1 << 4, logging.WARNING),
    (1 << 5, logging.INFO),
)
_FLAG_RECURSION = 1 << 0
_FLAG_FATAL = 1 << 1


@dataclass(frozen=True, slots=True)
class Library:
    """The loaded library.

    Attributes:
        ffi: cffi's FFI with the declarations.
        lib: the functions.
        keep: what the library points to and has to outlive everything.
        last_warning: one item, what the library logged last; explains a function that failed.
    """

    ffi: Any
    lib: Any
    keep: tuple[Any, ...]
    last_warning: list[str]


@functools.cache
def load() -> Library:
    """Return the library, loaded once per process.

    Raises:
        DependencyError: it, or cffi, is not installed; the message names the package.
    """
    try:
        import cffi
    except ImportError:
        raise DependencyError(
            "the SPICE server needs Python's cffi, which is not installed (Debian: python3-cffi)"
        ) from None
    ffi = cffi.FFI()
    ffi.cdef(_DECLARATIONS)
    ffi.cdef(_GLIB_DECLARATIONS)
    try:
        lib: Any = ffi.dlopen(SONAME)
        glib: Any = ffi.dlopen(_GLIB)
    except OSError:
        raise DependencyError(
            f"the SPICE server {SONAME} is not installed; Debian's package libspice-server1 "
            "brings it"
        ) from None
    last_warning = [""]
    try:
        handler = ffi.callback("GLogFunc", _LogHandler(ffi, last_warning), onerror=callback_failed)
    except MemoryError:
        raise ResourceError(
            "the SPICE server needs memory that can be written and executed, for callbacks, and "
            "this process may have none (systemd: MemoryDenyWriteExecute=no)"
        ) from None
    levels = sum(level for level, _ in _LEVELS) | _FLAG_RECURSION | _FLAG_FATAL
    glib.g_log_set_handler(b"Spice", levels, handler, ffi.NULL)
    return Library(ffi, lib, (handler, glib), last_warning)


def callback_failed(kind: Any, error: Any, trace: Any) -> None:
    """For ``onerror`` of every callback: a mistake of ours, which C code cannot be told of."""
    log.error("a callback of the SPICE server failed", exc_info=(kind, error, trace))


class _LogHandler:
    """Writes the library's log lines to ours; clients can cause some of them."""

    def __init__(self, ffi: Any, last_warning: list[str]) -> None:
        self._ffi = ffi
        self._last_warning = last_warning
        self._log = RateLimitedLog(log)

    def __call__(self, domain: Any, level: int, message: Any, data: Any) -> None:
        text = self._ffi.string(message).decode(errors="replace").strip()
        self._last_warning[0] = text
        ours = next((ours for theirs, ours in _LEVELS if level & theirs), logging.INFO)
        self._log.log(ours, "spice-server: %s", text)
