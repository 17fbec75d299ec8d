"""An emulator with the device inside: bare-metal x86-64 code talks to a SPICE agent's host end.

    pip install unicorn        (and gcc, which compiles guest.c)
    python examples/unicorn/run.py
    python examples/unicorn/run.py --save FILE       (ends in the middle of an agent message)
    python examples/unicorn/run.py --restore FILE    (goes on there, in another process)

The machine is a processor (Unicorn), RAM, a PCI bus with one function, and a debug port that
prints. It has no event loop of its own: when the guest halts, it waits for what the device waits
for, and goes on when the device's interrupt is asserted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import mmap
import select
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

import unicorn
from unicorn import x86_const as x86

from vring import GuestMemory, Region
from vring_serial import (
    Controller,
    HostAgent,
    InProcessPci,
    Monitor,
    PolledHost,
    Port,
    ProtocolChardev,
    StateError,
    VringSerialError,
)

RAM_SIZE = 16 << 20
ENTRY = 0x10_0000
PCI_HOLE, PCI_HOLE_SIZE = 0xE000_0000, 0x100_0000
SLOT = 5
#: Instructions of the guest between two looks whether it is time to save.
SLICE = 5000
#: All that this guest has in its processor.
REGISTERS = [
    *(x86.UC_X86_REG_RAX, x86.UC_X86_REG_RBX, x86.UC_X86_REG_RCX, x86.UC_X86_REG_RDX),
    *(x86.UC_X86_REG_RSI, x86.UC_X86_REG_RDI, x86.UC_X86_REG_RBP, x86.UC_X86_REG_RSP),
    *(x86.UC_X86_REG_R8, x86.UC_X86_REG_R9, x86.UC_X86_REG_R10, x86.UC_X86_REG_R11),
    *(x86.UC_X86_REG_R12, x86.UC_X86_REG_R13, x86.UC_X86_REG_R14, x86.UC_X86_REG_R15),
    x86.UC_X86_REG_EFLAGS,
]


class Machine:
    """One processor, RAM, and a PCI bus with one function on it; :meth:`plug` comes next."""

    pci: InProcessPci

    def __init__(self, host: PolledHost) -> None:
        self.ram = mmap.mmap(-1, RAM_SIZE)
        self.memory = GuestMemory([Region(0, self.ram)])
        self.host = host
        self.interrupt = False
        self.stopped = False
        self._config_address = 0
        self._next = ENTRY
        self._cpu = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        ram_at = ctypes.addressof(ctypes.c_char.from_buffer(self.ram))
        self._cpu.mem_map_ptr(0, RAM_SIZE, unicorn.UC_PROT_ALL, ram_at)
        self._cpu.mmio_map(
            PCI_HOLE, PCI_HOLE_SIZE, self._memory_read, None, self._memory_write, None
        )
        self._cpu.hook_add(unicorn.UC_HOOK_INSN, self._port_in, None, 1, 0, x86.UC_X86_INS_IN)
        self._cpu.hook_add(unicorn.UC_HOOK_INSN, self._port_out, None, 1, 0, x86.UC_X86_INS_OUT)
        self._cpu.reg_write(x86.UC_X86_REG_RSP, RAM_SIZE - 8)

    def plug(self, device: Controller, program: bytes) -> None:
        """Plug a device in that was started, and load the program."""
        self.ram[ENTRY : ENTRY + len(program)] = program
        self.pci = InProcessPci(
            self.host, device, self.memory, msi=self._message, intx=self._interrupt_changed
        )

    def save(self, path: Path) -> None:
        """Write everything to a file; the device stands still from then on."""
        device = self.pci.save()  # before memory, which the device no longer changes
        machine = {
            "registers": [self._cpu.reg_read(register) for register in REGISTERS],
            "next": self._next,
            "config_address": self._config_address,
            "device": len(device),
        }
        path.write_bytes(json.dumps(machine).encode() + b"\n" + device + self.ram[:])

    def restore(self, path: Path, device: Controller) -> None:
        """Go on from a file, with a device that was not started. Raises StateError."""
        header, _, rest = path.read_bytes().partition(b"\n")
        try:
            machine = json.loads(header)
            size = machine["device"]
            self.ram[:] = rest[size:]
            for register, value in zip(REGISTERS, machine["registers"], strict=True):
                self._cpu.reg_write(register, value)
            self._next = machine["next"]
            self._config_address = machine["config_address"]
        except (ValueError, LookupError, TypeError) as error:
            raise StateError(f"{path}: it is no snapshot of this machine: {error}") from None
        self.pci = self.host.complete(
            InProcessPci.restore(
                rest[:size],
                self.host,
                device,
                self.memory,
                msi=self._message,
                intx=self._interrupt_changed,
            )
        )

    def run_until(self, reached: Callable[[], bool]) -> None:
        """Run the guest in slices until ``reached``, wherever it is then."""
        while not self.stopped and not reached():
            # A guest that halted looks at its queues again, and halts again: it does no harm.
            self._cpu.emu_start(self._next, 0, count=SLICE)
            self._next = self._cpu.reg_read(x86.UC_X86_REG_RIP)
            self.host.poll()

    def run(self, done: Callable[[], bool]) -> None:
        """Run the guest; while it halts, wait for its interrupt. ``done`` ends this."""
        while not self.stopped and not done():
            self._cpu.emu_start(self._next, 0)
            self._next = self._cpu.reg_read(x86.UC_X86_REG_RIP)
            wait = self.host.poll()
            while not self.interrupt and not self.stopped and not done():
                select.select([self.host], [], [], wait)
                wait = self.host.poll()

    def _message(self, address: int, data: int) -> None:
        """Take an MSI-X message; this guest enables none."""

    def _interrupt_changed(self, level: bool) -> None:
        self.interrupt = level

    def _memory_read(self, _cpu: object, offset: int, size: int, _data: object) -> int:
        found = self.pci.find(PCI_HOLE + offset)
        return (1 << 8 * size) - 1 if found is None else found[0].read(found[1], size)

    def _memory_write(
        self, _cpu: object, offset: int, size: int, value: int, _data: object
    ) -> None:
        found = self.pci.find(PCI_HOLE + offset)
        if found is not None:
            found[0].write(found[1], value, size)

    def _port_in(self, _cpu: object, port: int, size: int, _data: object) -> int:
        if 0xCFC <= port < 0xD00 and self._config_address >> 11 & 0x1FFFFF == 1 << 20 | SLOT:
            return self.pci.config.read((self._config_address & 0xFC) + port - 0xCFC, size)
        return (1 << 8 * size) - 1

    def _port_out(self, _cpu: object, port: int, size: int, value: int, _data: object) -> None:
        if port == 0xCF8:
            self._config_address = value
        elif 0xCFC <= port < 0xD00:
            if self._config_address >> 11 & 0x1FFFFF == 1 << 20 | SLOT:
                self.pci.config.write((self._config_address & 0xFC) + port - 0xCFC, value, size)
        elif port == 0xE9:
            sys.stdout.write(chr(value & 0xFF))
        elif port == 0xF4:
            self.stopped = True


def compile_guest(directory: str) -> bytes:
    """The program as it lies in RAM, from ENTRY on."""
    source, binary = Path(__file__).with_name("guest.c"), Path(directory, "guest.bin")
    flags = "-O2 -Wall -ffreestanding -nostdlib -static -no-pie -fno-pic -mno-red-zone -mno-sse"
    flags += " -fno-stack-protector -fcf-protection=none -fno-asynchronous-unwind-tables"
    script = Path(directory, "guest.ld")
    script.write_text(
        f"ENTRY(start) SECTIONS {{ . = {ENTRY:#x}; .text : {{ *(.text.start) *(.text*) }}"
        " .data : { *(.rodata*) *(.data*) } .bss : { *(.bss*) *(COMMON) }"
        " /DISCARD/ : { *(.note*) *(.comment) } }"
    )
    command = ["gcc", *flags.split(), f"-Wl,-T,{script},--oformat=binary,--build-id=none"]
    subprocess.run([*command, str(source), "-o", str(binary)], check=True)
    return binary.read_bytes()


async def copy(agent: HostAgent, text: str) -> None:
    """Do what a SPICE client does whose user copies."""
    await agent.wait_ready()
    print("host:  the guest's agent is there")
    await agent.set_monitors([Monitor(1920, 1080)])
    print("host:  it has taken the resolution")
    await agent.set_clipboard(text)


async def paste(agent: HostAgent) -> None:
    """Do what a SPICE client does whose user pastes."""
    await agent.wait_ready()
    await agent.wait_clipboard()
    print(f'host:  the guest copied "{await agent.get_clipboard()}"')


async def talk(agent: HostAgent) -> None:
    """Do both: the guest copies what it gets, in capitals."""
    await copy(agent, "hello from the host")
    await paste(agent)


@contextlib.asynccontextmanager
async def conversation(talk: Coroutine[None, None, None]) -> AsyncIterator[asyncio.Task[None]]:
    """Talk while the guest runs; what it has not come to by the end is left out."""
    task = asyncio.ensure_future(talk)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def begin(machine: Machine, device: Controller) -> None:
    """Start the guest's program."""
    with tempfile.TemporaryDirectory() as directory:
        program = compile_guest(directory)
    machine.host.complete(device.start())
    machine.plug(device, program)


def talk_to_the_end(machine: Machine, talk: Coroutine[None, None, None]) -> None:
    with machine.host.using(conversation(talk)) as talking:
        machine.run(talking.done)
        if not talking.done():
            sys.exit("the guest gave up")
        talking.result()


def save(machine: Machine, device: Controller, agent: HostAgent, path: Path) -> None:
    """Copy a text that the guest cannot take at once, and save when it has taken a part."""

    def in_the_middle() -> bool:
        session = device.ports[1].state.session
        return session is not None and bool(session.unread)

    with machine.host.using(conversation(copy(agent, "hello from the host, " * 60))):
        machine.run_until(in_the_middle)
        if machine.stopped:
            sys.exit("the guest gave up")
        machine.save(path)
    print("host:  saved in the middle of a message")


def main() -> None:
    parser = argparse.ArgumentParser(description="A guest that is a SPICE agent.")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--save", metavar="FILE", type=Path, help="end in the middle, saved there")
    way.add_argument("--restore", metavar="FILE", type=Path, help="go on from there")
    options = parser.parse_args()
    agent = HostAgent()
    device = Controller(max_ports=2)
    device.add_port(Port(1, "com.redhat.spice.0", ProtocolChardev("agent", agent.protocol_factory)))
    with PolledHost() as host, contextlib.ExitStack() as ends:
        machine = Machine(host)
        ends.callback(lambda: host.complete(device.aclose()))
        ends.enter_context(host.using(agent))
        if options.restore is None:
            begin(machine, device)
        else:
            machine.restore(options.restore, device)
        ends.enter_context(machine.pci)
        if options.save is not None:
            save(machine, device, agent, options.save)
        else:
            talk_to_the_end(machine, talk(agent) if options.restore is None else paste(agent))


if __name__ == "__main__":
    try:
        main()
    except (VringSerialError, subprocess.CalledProcessError, OSError) as error:
        sys.exit(f"run.py: {error}")
