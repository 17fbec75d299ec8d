"""The commands of the monitor, with their types."""

from __future__ import annotations

from vring_serial.service.qmp.schema import (
    ANY,
    BOOL,
    EMPTY,
    INT,
    STR,
    Array,
    Command,
    Enum,
    Event,
    Member,
    Object,
)

_RUN_STATE = Enum("RunState", ("running", "prelaunch", "shutdown", "internal-error"))
_FORMAT = Enum("DataFormat", ("utf8", "base64"))
_LEVEL = Enum("VringLogLevel", ("debug", "info", "warning", "error"))
_CAPABILITY = Enum("QMPCapability", ("oob",))

_VERSION = Object(
    "VersionInfo",
    (
        Member(
            "qemu",
            Object(
                "VersionTriple", (Member("major", INT), Member("minor", INT), Member("micro", INT))
            ),
        ),
        Member("package", STR),
    ),
)
_CHARDEV = Object(
    "ChardevInfo",
    (Member("label", STR), Member("filename", STR), Member("frontend-open", BOOL)),
)
_NAMED = Object("NamedInfo", (Member("name", STR),))
_PROPERTY = Object(
    "ObjectPropertyInfo",
    (
        Member("name", STR),
        Member("type", STR),
        Member("description", STR, optional=True),
        Member("default-value", ANY, optional=True),
    ),
)
_VIRTIO = Object("VirtioInfo", (Member("path", STR), Member("name", STR)))
_FEATURES = Object(
    "VirtioDeviceFeatures",
    (
        Member("transports", Array(STR)),
        Member("dev-features", Array(STR), optional=True),
        Member("unknown-dev-features", INT, optional=True),
    ),
)
_VIRTIO_STATUS = Object(
    "VirtioStatus",
    (
        Member("name", STR),
        Member("device-id", INT),
        Member("vhost-started", BOOL),
        Member("device-endian", STR),
        Member("guest-features", _FEATURES),
        Member("host-features", _FEATURES),
        Member("backend-features", _FEATURES),
        Member("num-vqs", INT),
        Member(
            "status",
            Object(
                "VirtioDeviceStatus",
                (Member("statuses", Array(STR)), Member("unknown-statuses", INT, optional=True)),
            ),
        ),
        Member("isr", INT),
        Member("queue-sel", INT),
        Member("vm-running", BOOL),
        Member("broken", BOOL),
        Member("disabled", BOOL),
        Member("use-started", BOOL),
        Member("started", BOOL),
        Member("start-on-kick", BOOL),
        Member("disable-legacy-check", BOOL),
        Member("bus-name", STR),
        Member("use-guest-notifier-mask", BOOL),
    ),
)
_QUEUE_STATUS = Object(
    "VirtQueueStatus",
    (
        Member("name", STR),
        Member("queue-index", INT),
        Member("inuse", INT),
        Member("vring-num", INT),
        Member("vring-num-default", INT),
        Member("vring-align", INT),
        Member("vring-desc", INT),
        Member("vring-avail", INT),
        Member("vring-used", INT),
        Member("last-avail-idx", INT, optional=True),
        Member("shadow-avail-idx", INT, optional=True),
        Member("used-idx", INT),
        Member("signalled-used", INT),
        Member("signalled-used-valid", BOOL),
    ),
)
_PATH = Object("VirtioPath", (Member("path", STR),))
_TRAFFIC = Object(
    "VringTraffic",
    tuple(
        Member(name, INT)
        for name in (
            *("bytes", "chains", "kicks", "calls", "calls_saved", "throttled_ns", "dropped"),
        )
    ),
)
_PORT = Object(
    "VringPort",
    (
        Member("id", STR),
        Member("nr", INT),
        Member("name", STR),
        Member("console", BOOL),
        Member("chardev", STR),
        Member("description", STR),
        Member("filename", STR),
        Member("behind", STR),
        Member("focus", BOOL),
        Member("guest_open", BOOL),
        Member("guest_ready", BOOL),
        Member("host_open", BOOL),
        Member("host_connects", INT),
        Member("descriptor", BOOL),
        Member("size", ANY),
        Member("out", _TRAFFIC),
        Member("in", _TRAFFIC),
    ),
)
_CONTROLLER = Object(
    "VringController",
    (
        Member("id", STR),
        Member("socket", STR),
        Member("protocol", STR),
        Member("frontend", BOOL),
        Member("frontend_connects", INT),
        Member("max_ports", INT),
        Member("num_queues", INT),
        Member("status", INT),
        Member("needs_reset", BOOL),
        Member("offered", INT),
        Member("features", INT),
        Member("ports", Array(_PORT)),
    ),
)
_VM = Object(
    "VringVm",
    (
        Member("name", STR),
        Member("answers", BOOL),
        Member("prefix", STR),
        Member("restarts", INT),
        Member("controllers", Array(_CONTROLLER)),
        Member(
            "spare",
            Array(
                Object(
                    "VringSpare",
                    (
                        Member("chardev", STR),
                        Member("description", STR),
                        Member("filename", STR),
                        Member("behind", STR),
                    ),
                )
            ),
            optional=True,
        ),
    ),
)


def _wrapped(name: str, *members: Member) -> Object:
    """Return the ``data`` of a kind of chardev, as QAPI wraps it."""
    common = (
        Member("logfile", STR, optional=True),
        Member("logappend", BOOL, optional=True),
        Member("logtimestamp", BOOL, optional=True),
        Member("logsize", INT, optional=True),
        Member("logbackups", INT, optional=True),
    )
    data = Object(f"Chardev{name}", (*common, *members))
    return Object(f"Chardev{name}Wrapper", (Member("data", data),))


def _switches(*names: str) -> tuple[Member, ...]:
    return tuple(Member(name, BOOL, optional=True) for name in names)


_SOCKET_ADDRESS = Object(
    "SocketAddressLegacy",
    (Member("type", Enum("SocketAddressType", ("inet", "unix", "vsock", "fd"))),),
    tag="type",
    variants={
        "inet": Object(
            "InetSocketAddressWrapper",
            (
                Member(
                    "data",
                    Object(
                        "InetSocketAddress",
                        (
                            Member("host", STR),
                            Member("port", STR),
                            Member("to", INT, optional=True),
                            *_switches("numeric", "ipv4", "ipv6", "keep-alive", "mptcp"),
                        ),
                    ),
                ),
            ),
        ),
        "unix": Object(
            "UnixSocketAddressWrapper",
            (
                Member(
                    "data",
                    Object(
                        "UnixSocketAddress",
                        (Member("path", STR), *_switches("abstract", "tight")),
                    ),
                ),
            ),
        ),
    },
)
_BACKENDS = {
    "file": _wrapped(
        "File",
        Member("in", STR, optional=True),
        Member("out", STR),
        Member("append", BOOL, optional=True),
    ),
    "pipe": _wrapped("Hostdev", Member("device", STR)),
    "serial": _wrapped("Hostdev", Member("device", STR)),
    "socket": _wrapped(
        "Socket",
        Member("addr", _SOCKET_ADDRESS),
        Member("reconnect-ms", INT, optional=True),
        *_switches("server", "wait", "nodelay", "telnet", "tn3270", "websocket"),
    ),
    "udp": _wrapped(
        "Udp",
        Member("remote", _SOCKET_ADDRESS),
        Member("local", _SOCKET_ADDRESS, optional=True),
    ),
    "pty": _wrapped("Pty", Member("path", STR, optional=True)),
    "null": _wrapped("Common"),
    "ringbuf": _wrapped("Ringbuf", Member("size", INT, optional=True)),
}
_CHARDEV_AND_BACKEND = Object(
    "ChardevAndBackend",
    (
        Member("id", STR),
        Member(
            "backend",
            Object(
                "ChardevBackend",
                (Member("type", Enum("ChardevBackendKind", tuple(_BACKENDS))),),
                tag="type",
                variants=_BACKENDS,
            ),
        ),
    ),
)
_CHARDEV_RETURN = Object("ChardevReturn", (Member("pty", STR, optional=True),))

#: Everything that a client may execute, by name.
COMMANDS = {
    command.name: command
    for command in (
        Command(
            "qmp_capabilities",
            Object("QmpCapabilities", (Member("enable", Array(_CAPABILITY), optional=True),)),
        ),
        Command("query-version", returns=_VERSION),
        Command("query-commands", returns=Array(_NAMED)),
        Command("query-qmp-schema", returns=Array(ANY)),
        Command(
            "query-status",
            returns=Object("StatusInfo", (Member("running", BOOL), Member("status", _RUN_STATE))),
        ),
        Command("query-name", returns=Object("NameInfo", (Member("name", STR, optional=True),))),
        Command("query-chardev", returns=Array(_CHARDEV)),
        Command("query-chardev-backends", returns=Array(_NAMED)),
        Command("chardev-add", _CHARDEV_AND_BACKEND, _CHARDEV_RETURN),
        Command("chardev-change", _CHARDEV_AND_BACKEND, _CHARDEV_RETURN),
        Command("chardev-remove", Object("ChardevRemove", (Member("id", STR),))),
        Command(
            "device_add",
            Object(
                "DeviceAdd",
                (
                    Member("driver", STR),
                    Member("bus", STR, optional=True),
                    Member("id", STR, optional=True),
                ),
                open=True,
            ),
        ),
        Command("device_del", Object("DeviceDel", (Member("id", STR),))),
        Command("chardev-send-break", Object("ChardevId", (Member("id", STR),))),
        Command(
            "ringbuf-read",
            Object(
                "RingbufRead",
                (
                    Member("device", STR),
                    Member("size", INT),
                    Member("format", _FORMAT, optional=True),
                ),
            ),
            STR,
        ),
        Command(
            "ringbuf-write",
            Object(
                "RingbufWrite",
                (
                    Member("device", STR),
                    Member("data", STR),
                    Member("format", _FORMAT, optional=True),
                ),
            ),
        ),
        Command(
            "device-list-properties",
            Object("TypeName", (Member("typename", STR),)),
            Array(_PROPERTY),
        ),
        Command("x-query-virtio", returns=Array(_VIRTIO), unstable=True),
        Command("x-query-virtio-status", _PATH, _VIRTIO_STATUS, unstable=True),
        Command(
            "x-query-virtio-queue-status",
            Object("VirtioPathQueue", (Member("path", STR), Member("queue", INT))),
            _QUEUE_STATUS,
            unstable=True,
        ),
        Command("x-vring-status", returns=Array(_VM), unstable=True),
        Command(
            "x-vring-disconnect",
            Object(
                "VringDisconnect",
                (Member("chardev", STR, optional=True), Member("controller", STR, optional=True)),
            ),
            unstable=True,
        ),
        Command(
            "x-vring-log-level",
            Object("VringLogLevelArg", (Member("level", _LEVEL),)),
            unstable=True,
        ),
        Command(
            "x-vring-restart",
            Object("VringRestart", (Member("vm", STR, optional=True),)),
            unstable=True,
        ),
        Command(
            "x-vring-vm-add",
            Object(
                "VringVmAdd",
                (Member("name", STR), Member("config", Object("VringVmConfig", open=True))),
            ),
            unstable=True,
        ),
        Command(
            "x-vring-vm-remove",
            Object("VringVmRemove", (Member("name", STR),)),
            unstable=True,
        ),
    )
}

#: Those of them that a monitor of one VM alone has not.
OF_SERVICE = frozenset({"x-vring-vm-add", "x-vring-vm-remove"})

#: Everything that a client is told of.
EVENTS = (
    Event("VSERPORT_CHANGE", Object("VserportChange", (Member("id", STR), Member("open", BOOL)))),
    Event(
        "DEVICE_DELETED",
        Object("DeviceDeleted", (Member("device", STR, optional=True), Member("path", STR))),
    ),
    Event(
        "SHUTDOWN",
        Object(
            "Shutdown",
            (
                Member("guest", BOOL),
                Member(
                    "reason",
                    Enum("ShutdownCause", ("none", "host-error", "host-qmp-quit", "host-signal")),
                ),
            ),
        ),
    ),
    Event(
        "X_VRING_FRONTEND",
        Object(
            "VringFrontend",
            (
                Member("controller", STR),
                Member("state", Enum("VringFrontendState", ("connected", "resumed", "gone"))),
            ),
        ),
        unstable=True,
    ),
    Event(
        "X_VRING_WORKER",
        Object(
            "VringWorker",
            (
                Member("vm", STR),
                Member("restarts", INT),
                Member("reason", Enum("VringWorkerReason", ("died", "replaced"))),
            ),
        ),
        unstable=True,
    ),
    Event(
        "X_VRING_VM",
        Object(
            "VringVmChange",
            (Member("vm", STR), Member("state", Enum("VringVmState", ("added", "removed")))),
        ),
        unstable=True,
    ),
)
#: Those of them that a monitor of one VM alone does not tell of.
EVENTS_OF_SERVICE = frozenset({"X_VRING_VM"})

__all__ = ["COMMANDS", "EMPTY", "EVENTS", "EVENTS_OF_SERVICE", "OF_SERVICE"]
