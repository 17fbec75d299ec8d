"""What a process that serves guests gives up once everything is open, in layers.

A guest that takes over the process then finds one that can use what is open, reach the few paths
that its host ends need again, and do little else. See docs/decisions/0020.
"""

from __future__ import annotations

import ctypes
import grp
import os
import pwd
import resource
from collections.abc import Mapping
from dataclasses import dataclass, field

from vring import _confine
from vring_serial.config.words import parse_bool, parse_int, parse_size, suggest
from vring_serial.errors import ConfigError, ResourceError
from vring_serial.service import landlock, seccomp
from vring_serial.service.last_words import LastWords
from vring_serial.service.reach import Reach

#: Layers that can be turned off one by one.
CAPABILITIES, LANDLOCK, SECCOMP = LAYERS = ("capabilities", "landlock", "seccomp")
LIMITS = ("memory", "descriptors")

#: Lets a superuser write into directories that are not his.
_CAP_DAC_OVERRIDE = 1
_PR_SET_DUMPABLE = 4


@dataclass(frozen=True, slots=True)
class Account:
    """Whom the process becomes.

    Attributes:
        uid, gid: user and group.
        groups: all of its groups.
    """

    uid: int
    gid: int
    groups: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, where: str) -> Account:
        """``NAME[:GROUP]``, names or numbers. Raises ConfigError."""
        name, _, group = text.partition(":")
        try:
            entry = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
        except (KeyError, OverflowError):
            raise ConfigError(f"there is no user {name}", where) from None
        try:
            gid = entry.pw_gid
            if group:
                found = grp.getgrgid(int(group)) if group.isdecimal() else grp.getgrnam(group)
                gid = found.gr_gid
        except (KeyError, OverflowError):
            raise ConfigError(f"there is no group {group}", where) from None
        groups = (gid,) if group else tuple(os.getgrouplist(entry.pw_name, gid))
        return cls(entry.pw_uid, gid, groups)


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Which layers there are.

    Attributes:
        layers: some of LAYERS. None of them: the process keeps everything but for what follows.
        memory: bytes of private memory (RLIMIT_DATA), without what guests share; None: no limit.
        descriptors: that may be open; None: no limit of ours.
        account: whom the process becomes; None: it stays who it is.
    """

    layers: frozenset[str] = frozenset(LAYERS)
    memory: int | None = None
    descriptors: int | None = None
    account: Account | None = None

    @classmethod
    def parse(cls, text: str, user: str | None = None) -> Sandbox:
        """``on``, ``off``, or ``[on,|off,]LAYER=on|off,memory=SIZE,descriptors=N``, and a user.

        Raises ConfigError, with the option's name.
        """
        layers = set(LAYERS)
        limits: dict[str, int] = {}
        for number, item in enumerate(text.split(",")):
            key, given, value = item.partition("=")
            where = f"--sandbox {item}"
            try:
                if not number and not given and key in ("on", "off"):
                    layers = set(LAYERS) if key == "on" else set()
                elif key in LIMITS:
                    limits[key] = (parse_size if key == "memory" else parse_int)(value)
                elif (layer := key.removeprefix("no-") if not given else key) in LAYERS:
                    is_on = parse_bool(value) if given else layer == key
                    (layers.add if is_on else layers.discard)(layer)
                else:
                    raise ValueError(suggest(key, ("on", "off", *LAYERS, *LIMITS)))
            except ValueError as error:
                raise ConfigError(str(error), where) from None
        account = None if user is None else Account.parse(user, f"--user {user}")
        return cls(frozenset(layers), limits.get("memory"), limits.get("descriptors"), account)


#: The process stays as it is.
NO_SANDBOX = Sandbox(frozenset())


@dataclass(slots=True)
class Entered:
    """What came of it.

    Attributes:
        on: layers that hold, each as one phrase.
        missing: layers that were asked for and cannot be, with the reason.
        unwritable: directories in which the process can no longer make or remove what it should.
    """

    on: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unwritable: list[str] = field(default_factory=list)


def enter(sandbox: Sandbox, reach: Reach, words: LastWords | None = None) -> Entered:
    """Give up what ``sandbox`` says, for ever and in all threads of this process.

    Args:
        sandbox: the layers.
        reach: what the process must still be able to do.
        words: how to tell of a system call that ended the process.

    Raises:
        ResourceError: a layer that the system has could not be made.
    """
    entered = Entered()
    # Loaded while any path can be opened.
    filters = _load_filters(entered) if SECCOMP in sandbox.layers else None
    doing = "no new privileges"
    try:
        if sandbox.layers or sandbox.account is not None:
            _confine.restrict_threads(_confine.NO_NEW_PRIVILEGES)
            entered.on.append("no-new-privileges")
        doing = "user"
        if sandbox.account is not None:
            if CAPABILITIES in sandbox.layers:
                _confine.restrict_threads(_confine.BOUNDING)
            _become(sandbox.account)
            entered.on.append(f"user {sandbox.account.uid}:{sandbox.account.gid}")
        doing = "limits"
        _limit(sandbox, entered)
        doing = CAPABILITIES
        if CAPABILITIES in sandbox.layers:
            _drop_capabilities(reach, entered)
        entered.unwritable = _unwritable(reach)
        doing = LANDLOCK
        if LANDLOCK in sandbox.layers:
            _enter_landlock(reach, entered)
        doing = SECCOMP
        if filters is not None:
            _enter_seccomp(filters, reach, words, entered)
    except OSError as error:
        without = f" (--sandbox {doing}=off does without)" if doing in LAYERS else ""
        raise ResourceError(f"sandbox: {doing}: {error.strerror or error}{without}") from None
    return entered


def _become(account: Account) -> None:
    os.setgroups(account.groups)
    os.setresgid(account.gid, account.gid, account.gid)
    os.setresuid(account.uid, account.uid, account.uid)
    # Else /proc/self is root's, where it is looked up what a peer's descriptors are.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


def _limit(sandbox: Sandbox, entered: Entered) -> None:
    wanted: Mapping[str, tuple[int, int | None]] = {
        "memory": (resource.RLIMIT_DATA, sandbox.memory),
        "descriptors": (resource.RLIMIT_NOFILE, sandbox.descriptors),
    }
    for name, (which, limit) in wanted.items():
        if limit is not None:
            hard = resource.getrlimit(which)[1]
            if hard != resource.RLIM_INFINITY:
                limit = min(limit, hard)
            resource.setrlimit(which, (limit, limit))
            entered.on.append(f"{name} up to {limit}")


def _drop_capabilities(reach: Reach, entered: Entered) -> None:
    """Drop all, but for the one without which a superuser cannot write where he should."""
    keep = 0
    kept = ""
    if os.geteuid() == 0 and any(not _owns(path) for path in reach.directories | reach.written):
        keep = 1 << _CAP_DAC_OVERRIDE
        kept = " but DAC_OVERRIDE"
    _confine.restrict_threads(_confine.BOUNDING, keep=keep)
    _confine.restrict_threads(_confine.CAPABILITIES, keep=keep)
    entered.on.append(f"no capabilities{kept}")


def _owns(path: str) -> bool:
    """Return whether the superuser can write at a path without capabilities."""
    try:
        status = os.stat(path)
    except OSError:
        return True
    writable = 0o002
    if status.st_uid == 0:
        writable = 0o200
    elif status.st_gid in (0, *os.getgroups()):
        writable = 0o020
    return bool(status.st_mode & writable)


def _unwritable(reach: Reach) -> list[str]:
    return [
        path
        for path in sorted(reach.directories)
        if not os.access(path, os.W_OK | os.X_OK, effective_ids=True)
    ]


def _enter_landlock(reach: Reach, entered: Entered) -> None:
    abi = landlock.version()
    if not abi:
        entered.missing.append("landlock (not in this kernel, not among its lsm=, or forbidden)")
        return
    ruleset = landlock.make_ruleset(reach, abi)
    try:
        _confine.restrict_threads(_confine.LANDLOCK, ruleset=ruleset)
    finally:
        os.close(ruleset)
    entered.on.append(f"landlock (version {abi})")
    if abi < landlock.VERSION_WITH_SCOPES:
        entered.missing.append(
            "landlock's limits on " + ("signals" if abi >= landlock.VERSION_WITH_TCP else "TCP")
        )


def _load_filters(entered: Entered) -> seccomp.Library | None:
    try:
        return seccomp.Library()
    except OSError:
        entered.missing.append(f"seccomp ({seccomp.SONAME} cannot be loaded)")
        return None


def _enter_seccomp(
    library: seccomp.Library, reach: Reach, words: LastWords | None, entered: Entered
) -> None:
    names = library.names()
    if words is not None:
        _confine.name_refused_calls(
            words.line,
            time_at=words.time_at,
            name_at=words.name_at,
            ahead_of_utc=words.ahead_of_utc,
            fd=words.fd,
            names=names,
        )
    try:
        count = library.confine(reach)
    except seccomp.NoFiltersError as error:
        entered.missing.append(f"seccomp ({error})")
        return
    entered.on.append(f"seccomp ({count} system calls)")
