"""An emulator with the device inside: bare-metal x86-64 code talks to a SPICE agent's host end.

    pip install unicorn        (and gcc, which compiles guest.c)
    python examples/unicorn/run.py

The machine is a processor (Unicorn), RAM, a PCI bus with one function, and a debug port that
prints. It has no event loop of its own: when the guest halts, it waits for what the device waits
for, and goes on when the device's interrupt is asserted.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import select
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
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
    VringSerialError,
)

RAM_SIZE = 16 << 20
ENTRY = 0x10_0000
PCI_HOLE, PCI_HOLE_SIZE = 0xE000_0000, 0x100_0000
SLOT = 5


class Machine:
    """One processor, RAM, and a PCI bus with one function on it."""

    def __init__(self, program: bytes, host: PolledHost, device: Controller) -> None:
        self.ram = mmap.mmap(-1, RAM_SIZE)
        self.ram[ENTRY : ENTRY + len(program)] = program
        self.host = host
        self.interrupt = False
        self.stopped = False
        self.pci = InProcessPci(
            host,
            device,
            GuestMemory([Region(0, self.ram)]),
            msi=lambda address, data: None,
            intx=self._interrupt_changed,
        )
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

    def run(self, done: Callable[[], bool]) -> None:
        """Run the guest; while it halts, wait for its interrupt. ``done`` ends this."""
        while not self.stopped and not done():
            self._cpu.emu_start(self._next, 0)
            self._next = self._cpu.reg_read(x86.UC_X86_REG_RIP)
            wait = self.host.poll()
            while not self.interrupt and not self.stopped and not done():
                select.select([self.host], [], [], wait)
                wait = self.host.poll()

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


async def talk(agent: HostAgent) -> None:
    """What a SPICE client would do with the guest."""
    await agent.wait_ready()
    print("host:  the guest's agent is there")
    await agent.set_monitors([Monitor(1920, 1080)])
    print("host:  it has taken the resolution")
    await agent.set_clipboard("hello from the host")
    await agent.wait_clipboard()
    print(f'host:  the guest copied "{await agent.get_clipboard()}"')


@contextlib.asynccontextmanager
async def conversation(agent: HostAgent) -> AsyncIterator[asyncio.Task[None]]:
    """Talk while the guest runs; what it has not come to by the end is left out."""
    task = asyncio.ensure_future(talk(agent))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        program = compile_guest(directory)
    agent = HostAgent()
    device = Controller(max_ports=2)
    device.add_port(Port(1, "com.redhat.spice.0", ProtocolChardev("agent", agent.protocol_factory)))
    with PolledHost() as host, host.using(device), host.using(agent):
        machine = Machine(program, host, device)
        with machine.pci, host.using(conversation(agent)) as talking:
            machine.run(talking.done)
            if not talking.done():
                sys.exit("the guest gave up")
            talking.result()


if __name__ == "__main__":
    try:
        main()
    except (VringSerialError, subprocess.CalledProcessError, OSError) as error:
        sys.exit(f"run.py: {error}")
