"""Bytes a second between stock QEMU's guest and host ends: our device beside QEMU's own.

One guest has three devices: QEMU's virtio-serial with socket chardevs, and ours over vhost-user and
over vfio-user, each served by a ``vring serve`` of its own. They take turns, so that all of them
meet the same machine. Each moves TOTAL bytes with the guest's ``dd``.
"""

from __future__ import annotations

import asyncio
import json
import re
import selectors
import socket
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import pytest

from tests.support.qemu_machine import ROOT, QemuMachine

MIB = 1 << 20
TOTAL = 128 * MIB
ROUNDS = 5
PORTS = 4
DEVICES = ("qemu", "vhost-user", "vfio-user")

pytestmark = pytest.mark.skipif(
    not (ROOT / ".vring-root").exists(), reason="QEMU not installed: `make peers-qemu` brings it"
)


class Rig:
    """The three devices and the guest."""

    def __init__(self, directory):
        self._directory = directory
        self._loop = asyncio.new_event_loop()
        self._stack = ExitStack()
        options = [*self._own(), *self._vhost_user(), *self._vfio_user()]
        self._machine = QemuMachine(directory, options, append="reboot=t")
        self._loop.run_until_complete(self._machine.start())
        lines = self.run("cd /sys/class/virtio-ports && grep . */name").splitlines()
        nodes = {name: node for node, name in (line.split("/name:") for line in lines)}
        self._nodes = {
            device: [f"/dev/{nodes[f'{device}.{nr}']}" for nr in range(1, PORTS + 1)]
            for device in DEVICES
        }
        self._sockets = {
            device: [self._connect(f"{device}.{nr}") for nr in range(1, PORTS + 1)]
            for device in DEVICES
        }

    def close(self):
        self._loop.run_until_complete(self._machine.aclose())
        self._stack.close()
        self._loop.close()

    def run(self, script):
        """A script in the guest; what it printed."""
        return self._loop.run_until_complete(self._machine.run(script, 120))

    def guest_to_host(self, device, block, ports):
        """MiB a second, from the first byte at the host to the last."""
        count = TOTAL // ports // block
        receiver = Receiver(self._sockets[device][:ports], count * block)
        commands = (
            f"dd if=/dev/zero of={node} bs={block} count={count} 2>/dev/null &"
            for node in self._nodes[device][:ports]
        )
        self.run("\n".join([*commands, "wait"]))
        receiver.join()
        return TOTAL / MIB / (receiver.last - receiver.first)

    def host_to_guest(self, device, block, ports):
        """MiB a second, as the guest measures; of several ports, the slowest counts."""
        count = TOTAL // ports // block
        senders = [
            threading.Thread(target=end.sendall, args=(bytes(count * block),))
            for end in self._sockets[device][:ports]
        ]
        for sender in senders:
            sender.start()
        copy = f"bs={block} count={count} iflag=fullblock of=/dev/null"
        commands = (
            f"time -f 'took %e' dd if={node} {copy} &" for node in self._nodes[device][:ports]
        )
        printed = self.run("\n".join(["exec 2>&1", *commands, "wait"]))
        for sender in senders:
            sender.join()
        took = [float(seconds) for seconds in re.findall(r"took ([\d.]+)", printed)]
        assert len(took) == ports, printed
        return TOTAL / MIB / max(took)

    def _connect(self, name):
        end = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        end.connect(f"{self._directory}/{name}")
        return end

    def _own(self):
        options = ["-device", "virtio-serial-pci,id=own,addr=06.0"]
        for nr in range(1, PORTS + 1):
            path = f"{self._directory}/qemu.{nr}"
            options += ["-chardev", f"socket,id=own{nr},path={path},server=on,wait=off"]
            options += ["-device", f"virtserialport,bus=own.0,chardev=own{nr},name=qemu.{nr}"]
        return options

    def _serve(self, how):
        """Start a ``vring serve``; its socket."""
        path = self._directory / how
        command = [sys.executable, "-m", "vring_serial", "serve", "--log-level", "error"]
        command += [f"--{how}", str(path), "--max-ports", str(PORTS + 1)]
        for nr in range(1, PORTS + 1):
            chardev = f"socket,id=c{nr},path={self._directory}/{how}.{nr},server=on,wait=off"
            command += ["--chardev", chardev, "--port", f"chardev=c{nr},nr={nr},name={how}.{nr}"]
        process = self._stack.enter_context(subprocess.Popen(command))
        self._stack.callback(process.terminate)
        while not path.exists():
            time.sleep(0.01)
        return path

    def _vhost_user(self):
        queues = 2 * (PORTS + 2)
        return [
            *("-chardev", f"socket,id=vu,path={self._serve('vhost-user')}", "-device"),
            "vhost-user-test-device-pci,chardev=vu,virtio-id=3,vq_size=128,config_size=12,"
            f"num_vqs={queues},addr=05.0",
        ]

    def _vfio_user(self):
        where = {"type": "unix", "path": str(self._serve("vfio-user"))}
        return ["-device", json.dumps({"driver": "vfio-user-pci", "addr": "07.0", "socket": where})]


class Receiver(threading.Thread):
    """Reads so many bytes from each socket, and notes when the first and the last of them came.

    One thread for all: several would take turns at the interpreter, not at the bytes.
    """

    def __init__(self, ends, size):
        super().__init__()
        self._left = dict.fromkeys(ends, size)
        self.first = self.last = 0.0
        self.start()

    def run(self):
        buffer = bytearray(256 << 10)
        with selectors.DefaultSelector() as selector:
            for end in self._left:
                selector.register(end, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    end = key.fileobj
                    self._left[end] -= end.recv_into(buffer, min(self._left[end], len(buffer)))
                    self.first = self.first or time.perf_counter()
                    if not self._left[end]:
                        selector.unregister(end)
        self.last = time.perf_counter()


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    rig = Rig(tmp_path_factory.mktemp("qemu"))
    yield rig
    rig.close()


@pytest.mark.parametrize("ports", [1, 4], ids=["1-port", "4-ports"])
@pytest.mark.parametrize("block", [4 << 10, 64 << 10], ids=["4K", "64K"])
@pytest.mark.parametrize("direction", ["guest_to_host", "host_to_guest"])
def test_dd(benchmark, rig, direction, block, ports):
    rates = {device: [] for device in DEVICES}

    def turns():
        for device in DEVICES:
            rates[device].append(getattr(rig, direction)(device, block, ports))

    benchmark.pedantic(turns, rounds=ROUNDS, warmup_rounds=1)
    median = {device: statistics.median(found[1:]) for device, found in rates.items()}
    for device, rate in median.items():
        benchmark.extra_info[f"{device} MiB/s"] = round(rate)
        benchmark.extra_info[f"{device} / qemu"] = round(rate / median["qemu"], 2)
