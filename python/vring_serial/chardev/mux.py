"""``mux=on``: one host end that several ports share, and keys that say which one is typed to."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable

from vring_serial.chardev.base import Chardev, DescriptorEnd, ProtocolEnd
from vring_serial.chardev.hangup import RECHECK_SECONDS, unread
from vring_serial.chardev.kept import KeptSockets
from vring_serial.chardev.mux_input import AREA_SIZE, MuxInput
from vring_serial.chardev.options import FRONTS_MAX
from vring_serial.chardev.relay import Relay
from vring_serial.errors import ConfigError, ResourceError
from vring_serial.keeping import Keeping

log = logging.getLogger(__name__)

#: Pieces of input that are handled before other things of the event loop.
_TURN_PIECES = 16
_OUTPUT = "output"


class Mux:
    """A host end, shared by the front ends that its ports have.

    What the ports write goes to the back end directly, in the order in which it comes; nothing of
    it comes here. What the back end gives goes to the front end that has the focus, but for the
    escape key and the key after it.

    Args:
        base: the back end, not started; its log gets what all ports write.
        keeping: of the back end; what this needs is kept there too.
        on_exit: ends the service; None: who asks for that is sent away instead.

    Attributes:
        base: the same.
    """

    def __init__(
        self,
        base: Chardev,
        keeping: Keeping | None = None,
        on_exit: Callable[[], None] | None = None,
    ) -> None:
        self.base = base
        base.keeping = keeping
        base.taken = self._taken
        base.attach(self)
        self._keeping = keeping
        self._on_exit = on_exit
        self._input = MuxInput(self._memory())
        self._fronts: dict[int, MuxFront] = {}  # by number, started or not
        self._started: list[MuxFront] = []
        self._size: tuple[int, int] | None = None
        self._read_fd = -1  # watched, to be read from
        self._write_fd = -1  # watched: the front end with the focus has no room
        self._turn_soon: asyncio.Handle | None = None
        self._at_end = False  # the back end gives no more, and what it gave may wait

    def front(self, name: str, keeping: Keeping | None = None, label: str = "") -> MuxFront:
        """Return a new front end, which has the focus, or a predecessor's of the same name.

        Args:
            name: its own among the front ends; ASCII, at most 48 characters.
            keeping: its own.
            label: what people call its port.

        Raises ConfigError, in QEMU's words: there are FRONTS_MAX.
        """
        names = self._input.names
        free = [i for i, known in enumerate(names) if known == name and i not in self._fronts]
        free += [i for i, known in enumerate(names) if not known]
        free += [i for i in range(FRONTS_MAX) if i not in self._fronts]
        if not free:
            text = f"too many uses of multiplexed chardev '{self.base.id}'"
            raise ConfigError(f"{text} (maximum is {FRONTS_MAX})")
        self._input.add(name, free[0])
        front = self._fronts[free[0]] = MuxFront(self, free[0], keeping, label or name)
        return front

    @property
    def focus(self) -> MuxFront | None:
        """The front end that is typed to."""
        number = self._input.focus
        return None if number is None else self._fronts.get(number)

    # --- for the front ends

    async def start_for(self, front: MuxFront) -> None:
        """Start the back end with the first of them. It leaves after an error, too.

        Raises ResourceError.
        """
        self._started.append(front)
        if len(self._started) == 1:
            await self.base.start_with_log()
        if self.base.end is not None and front.end is None and front in self._started:
            self._open(front)
            self._go_on()

    async def leave(self, front: MuxFront) -> None:
        """Stop the back end with the last of them."""
        self._started.remove(front)
        number = front.number
        if self._write_fd >= 0 and self._input.focus == number:
            self._unwatch_room()
        if self._started:
            self._fronts.pop(number, None)
            self._input.remove(number, self._next(number))
            self._go_on()
        else:
            await self.base.aclose_with_log()

    def is_first(self, front: MuxFront) -> bool:
        """Return whether it is the one that speaks for the back end."""
        return self._started[:1] == [front]

    def guest_opened(self) -> None:
        """Tell the back end whether a guest has one of them open."""
        self.base.guest_opened(any(front.guest_is_open for front in self._started))

    # --- ChardevUser

    def end_opened(self, end: DescriptorEnd | ProtocolEnd) -> None:
        """See ChardevUser."""
        for front in list(self._started):
            self._open(front)
        self._go_on()

    def end_replaced(self, end: DescriptorEnd, between: Callable[[], None]) -> None:
        """See ChardevUser."""
        self._unwatch_input()
        step = between
        for front in self._started:
            step = _replacing(front, end, step)
        step()
        self._go_on()

    def end_closed(self) -> None:
        """See ChardevUser."""
        self._stop()
        self._size = None
        for front in self._started:
            front.close()
        self._input.forget()

    def end_resized(self, cols: int, rows: int) -> None:
        """See ChardevUser."""
        self._size = (cols, rows)
        for front in self._started:
            front.resize(self._size)

    # --- input

    def _memory(self) -> memoryview:
        if self._keeping is not None:
            try:
                return self._keeping.area("mux", AREA_SIZE)
            except ResourceError as error:
                text = "chardev %s: its focus does not outlive a worker: %s"
                log.warning(text, self.base.id, error)
        return memoryview(bytearray(AREA_SIZE))

    def _open(self, front: MuxFront) -> None:
        assert self.base.end is not None
        front.open(self.base.end)
        if self._size is not None:
            front.resize(self._size)

    def _taken(self) -> int:
        """Return how many bytes the back end gave that no guest has read."""
        return self._input.pending + sum(front.unread for front in self._started)

    def _go_on(self) -> None:
        """Handle input in the next turn of the event loop, unless something is waited for."""
        if self._turn_soon is None and self._write_fd < 0:
            self._turn_soon = asyncio.get_running_loop().call_soon(self._turn)

    def _stop(self) -> None:
        self._unwatch_input()
        self._unwatch_room()
        self._at_end = False
        if self._turn_soon is not None:
            self._turn_soon.cancel()
            self._turn_soon = None

    def _turn(self) -> None:
        self._turn_soon = None
        for _ in range(_TURN_PIECES):
            end = self.base.end
            if not isinstance(end, DescriptorEnd):
                return
            if not self._hand_out():
                return
            if end.read_fd < 0:
                return
            if self._at_end:
                self._end_of_input()
                return
            try:
                self._at_end = not self._input.receive(end)
            except BlockingIOError:
                self._watch_input(end.read_fd)
                return
            except OSError as error:
                if error.errno != errno.EIO:  # how a terminal says that its other end is closed
                    self.base.peer_gone(error)
                    return
                self._at_end = True
        self._go_on()

    def _end_of_input(self) -> None:
        """Tell the back end that it is at its end, once the guests have read what it gave."""
        self._unwatch_input()
        if not self._taken():
            self._at_end = False
            self.base.peer_gone()
        else:
            loop = asyncio.get_running_loop()
            self._turn_soon = loop.call_later(RECHECK_SECONDS, self._turn)

    def _hand_out(self) -> bool:
        """Handle what has come; return whether more can be taken."""
        while self._input.pending:
            if (key := self._input.command()) is not None:
                self._obey(key)
                if self.base.end is None:
                    return False
                continue
            if not self._input.pending:
                return True
            front = self.focus
            if front is None or front.input is None:
                self._unwatch_input()
                return False  # it goes on when there is one
            try:
                self._input.send(front.input.fileno())
            except BlockingIOError:
                self._unwatch_input()
                self._write_fd = front.input.fileno()
                asyncio.get_running_loop().add_writer(self._write_fd, self._room)
                return False
        return True

    def _room(self) -> None:
        self._unwatch_room()
        self._turn()

    def _unwatch_room(self) -> None:
        if self._write_fd >= 0:
            asyncio.get_running_loop().remove_writer(self._write_fd)
            self._write_fd = -1

    def _watch_input(self, fd: int) -> None:
        if self._read_fd == fd:
            return
        self._unwatch_input()
        asyncio.get_running_loop().add_reader(fd, self._turn)
        self._read_fd = fd

    def _unwatch_input(self) -> None:
        if self._read_fd >= 0:
            asyncio.get_running_loop().remove_reader(self._read_fd)
            self._read_fd = -1

    # --- keys

    def _obey(self, key: int) -> None:
        """Do what the key after the escape says."""
        match chr(key):
            case "c":
                number = self._input.focus
                self._input.set_focus(self._next(FRONTS_MAX if number is None else number))
            case "h" | "?":
                self._say("".join(f"{line}\n\r" for line in self._help()))
            case "x":
                self._exit()
            case "s" | "t":
                what = "saves disks" if key == ord("s") else "toggles time stamps"
                self._say(f"C-a {chr(key)} {what} in QEMU, and is not served here\n\r")
            case _:
                pass  # b, a break, too: a port has no line, and QEMU's ignores it as well

    def _next(self, number: int) -> int | None:
        """Return the number of the front end after one, in a circle."""
        return min(self._fronts, key=lambda i: (i <= number, i), default=None)

    def _help(self) -> list[str]:
        leaves = "end the service" if self._on_exit is not None else "hang up"
        focus = self.focus
        return [
            "",
            "C-a h    print this help",
            f"C-a x    {leaves}",
            "C-a b    send break (without effect: a port has no line)",
            "C-a c    switch to the next port",
            "C-a C-a  sends C-a",
            f"input goes to {'nobody' if focus is None else focus.label}",
        ]

    def _exit(self) -> None:
        if self._on_exit is not None:
            self._say("vring: terminated\n\r")
            self._on_exit()
        elif not self.base.send_away():
            self._say("C-a x hangs up, and there is nobody to hang up on\n\r")

    def _say(self, text: str) -> None:
        """Write to the back end, as much as it takes at once."""
        end = self.base.end
        if isinstance(end, DescriptorEnd) and end.write_fd >= 0:
            try:
                os.write(end.write_fd, text.encode())
            except OSError as error:  # full, or it leaves
                log.debug("chardev %s: %s", self.base.id, error)


def _replacing(
    front: MuxFront, end: DescriptorEnd, inner: Callable[[], None]
) -> Callable[[], None]:
    return lambda: front.replace(end, inner)


class MuxFront(Chardev):
    """A port's part in a host end that several ports share; made by :meth:`Mux.front`.

    Its end is open while the back end's is. The guest reads from one end of a pair of sockets, to
    whose other end the Mux writes, and writes to the back end itself.

    Attributes:
        mux: what it is a part of.
        number: its own there.
        label: what people call its port.
        guest_is_open: whether the guest has its port open.
        input: where what the guest is to read is written; None while it is not started.
    """

    def __init__(self, mux: Mux, number: int, keeping: Keeping | None, label: str) -> None:
        super().__init__(mux.base.id)
        self.keeping = keeping
        self.log = mux.base.log
        self.mux = mux
        self.number = number
        self.label = label
        self.guest_is_open = False
        self.input: socket.socket | None = None
        self._read: socket.socket | None = None
        self._write_fd = -1
        self._relay: Relay | None = None
        self._kept = KeptSockets(None)

    @property
    def description(self) -> str:
        return f"mux of {self.mux.base.description}"

    @property
    def filename(self) -> str:
        return "mux"

    @property
    def has_focus(self) -> bool:
        """Whether what is typed is for it."""
        return self.mux.focus is self

    @property
    def unread(self) -> int:
        """Bytes that the guest has not read."""
        return 0 if self._read is None else unread(self._read.fileno())

    async def start(self) -> None:
        if self.input is not None:
            return
        self._kept = KeptSockets(self.keeping, f"chardev {self.id}")
        try:
            self._read, self.input = self._kept.pair()
        except OSError as error:
            raise self._error("make a pair of sockets", error) from error
        try:
            await self.mux.start_for(self)
        except BaseException:
            await self.aclose()
            raise

    async def start_with_log(self) -> None:
        await self.start()  # the log is the back end's

    async def aclose(self) -> None:
        if self.input is None:
            return
        self.close()
        self._kept.end_relay(_OUTPUT, self._relay)
        self._relay = None
        pair = self._read, self.input
        self._read = self.input = None
        try:
            await self.mux.leave(self)
        finally:
            self._kept.end_pair(pair)

    async def aclose_with_log(self) -> None:
        await self.aclose()

    def peer_gone(self, reason: OSError | None = None) -> None:
        self.mux.base.peer_gone(reason)

    def guest_opened(self, is_open: bool) -> None:
        self.guest_is_open = is_open
        self.mux.guest_opened()

    def reopen(self) -> None:
        if self.mux.is_first(self):
            self.mux.base.reopen()

    def send_away(self) -> bool:
        return self.mux.base.send_away()

    def send_break(self) -> None:
        self.mux.base.send_break()

    # --- for the Mux

    def open(self, end: DescriptorEnd | ProtocolEnd) -> None:
        """Open the end for one of the back end's. Raises OSError without descriptors."""
        if isinstance(end, DescriptorEnd):
            end = self._own(end)
        self._open_end(end)

    def replace(self, end: DescriptorEnd, between: Callable[[], None]) -> None:
        """Use another one of the back end's. Raises OSError without descriptors."""
        old, ours = self._write_fd, self._own(end)
        self._replace_end(ours, between)
        if old >= 0:
            os.close(old)

    def close(self) -> None:
        """Close the end, and forget what the guest has not read."""
        self._close_end()
        if self._write_fd >= 0:
            os.close(self._write_fd)
            self._write_fd = -1
        if self._read is not None:
            _drain(self._read)

    def resize(self, size: tuple[int, int]) -> None:
        """Tell the port of the terminal's size."""
        if self.end is not None and self._user is not None:
            self._user.end_resized(*size)

    def _own(self, end: DescriptorEnd) -> DescriptorEnd:
        """Return an end with descriptors of its own, which nobody else waits for."""
        assert self._read is not None
        if end.write_fd >= 0:
            self._write_fd = os.dup(end.write_fd)
            if end.write_relay is not None and self._relay is None:
                self._relay = self._kept.relay(_OUTPUT, self._write_fd)
        else:
            self._write_fd = -1
        relay = None if end.write_relay is None else self._relay
        return DescriptorEnd(self._read.fileno(), self._write_fd, end.kept, write_relay=relay)


def _drain(sock: socket.socket) -> None:
    """Read what is there, and forget it."""
    try:
        while sock.recv(1 << 16):
            pass
    except OSError:  # nothing more
        pass
