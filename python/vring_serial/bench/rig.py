"""The processes of a measurement: device, guest and peer."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vring_serial.bench import child
from vring_serial.bench.child import end_child, start_child
from vring_serial.bench.usage import cpu_seconds, pin
from vring_serial.bench.worker import Worker, interrupts_wait
from vring_serial.errors import ResourceError

#: Time limit for the device to listen, in seconds.
START_TIMEOUT = 20.0
#: Number of the port that echoes through a FIFO in the kernel, without a process behind it.
FIFO_PORT = 1
#: Number of the first port with a socket.
FIRST_PORT = 2


class Rig:
    """A device behind a vhost-user socket, with one port per socket of the peer.

    Attributes:
        ports: numbers of the ports that lead to the peer.
        ring: ``split`` or ``packed``.
        guest, peer: the processes of guest and peer.
    """

    def __init__(self, directory: Path, serve_pid: int, ports: list[int], ring: str) -> None:
        self.ports = ports
        self.ring = ring
        self.directory = directory
        self.serve_pid = serve_pid
        self.guest = Worker("guest_side:GuestSide")
        try:
            self.peer = Worker("peer_side:PeerSide")
        except BaseException:
            self.guest.close()
            raise

    def boot(self, queue_size: int, receive_size: int) -> None:
        """Connect the peer and the yardstick, and boot the guest with queues of ``queue_size``."""
        plain = str(self.directory / "plain")
        self.peer.call("connect", {nr: str(self.directory / f"port{nr}") for nr in self.ports})
        self.peer.call("listen_plain", plain)
        self.guest.call("connect_plain", plain)
        self.guest.call(
            "boot",
            str(self.directory / "vhost-user"),
            [FIFO_PORT, *self.ports],
            queue_size,
            receive_size,
            self.ring == "packed",
        )

    def place(self, processors: Sequence[int]) -> None:
        """Pin the guest to the first of these processors, device and peer to the last.

        Without pinning, the scheduler runs two processes that wake each other sometimes on one
        processor and sometimes on two, where a wake-up costs several times more.
        """
        pin(self.guest.pid, processors[0])
        pin(self.peer.pid, processors[-1])
        pin(self.serve_pid, processors[-1])

    def device_cpu_seconds(self) -> float:
        """Return the processor time that the device's process has used so far, in seconds."""
        return cpu_seconds(self.serve_pid)

    def timed(self, *sides: tuple[Worker, str, tuple[object, ...]]) -> float:
        """Start these commands in order; return the seconds until all are done."""
        start = time.monotonic()
        for worker, method, arguments in sides:
            worker.start(method, *arguments)
        return max(worker.finish()[0] for worker, _, _ in sides) - start

    def kill(self) -> None:
        """Kill the processes, whatever they wait for."""
        self.guest.kill()
        self.peer.kill()

    def close(self) -> None:
        """End the processes of guest and peer."""
        try:
            self.guest.close()
        finally:
            self.peer.close()


@contextlib.contextmanager
def running(
    ports: int = 1,
    *,
    queue_size: int = 256,
    receive_size: int = 4096,
    busy_poll: int = 0,
    ring: str = "split",
) -> Iterator[Rig]:
    """Start all processes, and end them with the block.

    Args:
        ports: number of ports with sockets.
        queue_size: descriptors of each of the guest's queues.
        receive_size: bytes of each of the guest's receive buffers.
        busy_poll: microseconds for which the device polls.
        ring: ``split`` or ``packed``.

    Raises ResourceError with the output of a part that does not start.
    """
    with tempfile.TemporaryDirectory(prefix="vring-bench-") as name:
        directory = Path(name)
        numbers = list(range(FIRST_PORT, FIRST_PORT + ports))
        options = ["--packed"] if ring == "packed" else []
        with contextlib.ExitStack() as stack:
            pid = stack.enter_context(serving(directory, numbers, busy_poll, options))
            with interrupts_wait():
                rig = Rig(directory, pid, numbers, ring)
                stack.callback(rig.close)
            try:
                rig.boot(queue_size, receive_size)
                yield rig
            except BaseException:  # one may wait for the other, which was told nothing
                rig.kill()
                raise


@contextlib.contextmanager
def serving(
    directory: Path, ports: list[int], busy_poll: int = 0, options: Sequence[str] = ()
) -> Iterator[int]:
    """Run `vring serve` in a separate process for the block, and yield its process id.

    Args:
        directory: directory for the sockets, ``vhost-user`` and ``portN`` for each port.
        ports: numbers of the ports with sockets; there is also :data:`FIFO_PORT`.
        busy_poll: microseconds for which it polls.
        options: further options of ``vring serve``.

    Raises ResourceError with its output if it does not start.
    """
    os.mkfifo(directory / "fifo")
    command = ["serve", "--no-keeper", "--log-level", "error"]  # the child has a thread already
    command += ["--vhost-user", f"{directory}/vhost-user", "--busy-poll", str(busy_poll)]
    command += ["--max-ports", str(ports[-1] + 1), *options]
    command += ["--chardev", f"pipe,id=fifo,path={directory}/fifo"]
    command += ["--port", f"chardev=fifo,nr={FIFO_PORT}"]
    for nr in ports:
        path = f"{directory}/port{nr}"
        command += ["--chardev", f"socket,id=port{nr},path={path},server=on,wait=off"]
        command += ["--port", f"chardev=port{nr},nr={nr}"]
    said = directory / "said"
    with contextlib.ExitStack() as stack:
        with said.open("wb") as output, interrupts_wait():
            process = start_child(child.__name__, *command, stdout=output, stderr=output)
            stack.callback(_end, process)
        _wait(
            lambda: (directory / "vhost-user").exists(),
            process,
            lambda: said.read_text(errors="replace").strip(),
        )
        yield process.pid


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    end_child(process, START_TIMEOUT)


def _wait(ready: Callable[[], bool], process: subprocess.Popen[bytes], said: object) -> None:
    end = time.monotonic() + START_TIMEOUT
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            assert callable(said)
            raise ResourceError(f"vring serve did not start: {said() or 'it said nothing'}")
        time.sleep(0.01)
