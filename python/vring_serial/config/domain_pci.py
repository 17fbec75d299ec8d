"""The PCI devices of a domain XML, with an address or still without.

The order of those without and the bus that each needs are libvirt's (its functions are
``qemuDomainAssignDevicePCISlots`` and ``qemuDomainDeviceCalculatePCIConnectFlags``), including
devices that libvirt adds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from vring_serial.config.pci import (
    CONVENTIONAL,
    PC,
    PSERIES,
    Q35,
    VIRT,
    PciMachine,
    PciSlots,
    Plug,
)
from vring_serial.config.topology import PciAddress
from vring_serial.config.xml_node import Node

#: Architectures with machines without PCI, each with its machines that have PCI.
_FEW_WITH_PCI = (
    (r"arm|aarch64", r"versatilepb$"),
    (r"mips", r"malta"),
    (r"riscv|s390|m68k|microblaze|or1k|xtensa|cris|sparc$|avr|rx|tricore", r"$^"),
)
_TRANSITIONAL = "virtio-transitional"
_BEFORE = ("filesystem", "interface", "sound")
_AFTER = (
    *("disk", "hostdev", "memballoon", "rng", "watchdog", "video", "shmem", "input", "serial"),
    *("iommu", "vsock", "memory", "crypto", "panic"),
)
#: Slots of bus 0 with the sound and USB controllers of q35's chipset.
_Q35_SOUND, _Q35_USB = 0x1B, (0x1D, 0x1A)
#: Disks per controller.
_DISKS = {"sata": 6, "scsi": 7}


def devices(root: Node, *tags: str) -> Iterator[Node]:
    """Yield the devices of a domain with one of these tags, or all of them."""
    for parent in root.children("devices"):
        yield from parent.children(*tags)


def pci_address(node: Node) -> PciAddress | None:
    """Return the address of an ``<address>``; None if it is all zero, which means any."""
    parts = {name: node.number(name) or 0 for name in ("domain", "bus", "slot", "function")}
    try:
        address = PciAddress(**parts)
    except ValueError as error:
        node.fail(str(error))
    return address if address != PciAddress() else None


def read_pci(root: Node) -> PciSlots | None:
    """Return the used addresses and the devices without one; None for a machine without PCI.

    Of our own controllers (type virtio-serial) only the place among the others counts.
    """
    machine = _machine(root)
    return None if machine is None else _Reader(root, machine).read()


def _machine(root: Node) -> PciMachine | None:
    arch, name = _arch_and_name(root)
    if re.match(r"s390|microvm|isapc|none$", name) or arch.startswith("s390"):
        return None
    if re.match(r"(pc-)?q35(-|$)", name):
        return Q35
    if re.match(r"virt(-|$)", name) or arch.startswith("loongarch"):
        return VIRT
    if re.match(r"pseries(-|$)", name):
        return PSERIES
    for arches, machines in _FEW_WITH_PCI:
        if re.match(arches, arch):
            return CONVENTIONAL if re.match(machines, name) else None
    return PC if not name or re.match(r"pc(-|$)|xenfv|fedora|ubuntu|rhel", name) else CONVENTIONAL


def _arch_and_name(root: Node) -> tuple[str, str]:
    os_ = root.child("os")
    type_ = os_.child("type") if os_ is not None else None
    if type_ is None:
        return "", ""
    return type_.get("arch") or "", type_.get("machine") or ""


class _Reader:
    """The reader of one domain."""

    def __init__(self, root: Node, machine: PciMachine) -> None:
        self._root = root
        self._machine = machine
        self._arch, _ = _arch_and_name(root)
        self._x86 = machine in (PC, Q35)
        self._slots = PciSlots(machine)
        self._usb_at_home: dict[int, bool] = {}  # of one slot for the functions of one index

    def read(self) -> PciSlots:
        slots = self._slots
        by_tag: dict[str, list[tuple[Node, bool]]] = {}
        for node in devices(self._root):
            by_tag.setdefault(node.tag, []).append((node, self._waits(node)))
        self._read_video(by_tag.get("video", []), graphics="graphics" in by_tag)
        for tag in _BEFORE:
            self._wait(slots.before, by_tag.get(tag, ()))
        earlier, later = self._controllers(by_tag.get("controller", ()))
        slots.before += earlier
        slots.after += later
        if "memballoon" not in by_tag and (self._x86 or self._machine is PSERIES):
            slots.after.append(Plug.EXPRESS)
        for tag in _AFTER:
            self._wait(slots.after, by_tag.get(tag, ()))
        return slots

    def _waits(self, node: Node) -> bool:
        """Return whether a device has no address yet; record the address that it has."""
        address = node.child("address")
        is_bus = node.tag == "controller" and node.get("type") == "pci"
        given = None
        if address is not None and address.get("type") == "pci":
            given = pci_address(address)
        if is_bus:
            self._slots.add_bus(
                node.number("index") or 0, node.get("model") or "", fixed=given is not None
            )
        if address is not None and address.get("type") == "virtio-mmio" and not self._x86:
            self._slots.ours_by_default = False
        if node.tag == "controller" and node.get("type") == "virtio-serial":
            return False
        if given is not None:
            self._slots.note(given, node.where)
            return False
        return not is_bus and (address is None or address.get("type") == "pci")

    def _wait(self, plugs: list[Plug], nodes: Iterable[tuple[Node, bool]]) -> None:
        for node, waits in nodes:
            if waits and (plug := self._plug(node)) is not None:
                plugs.append(plug)

    def _read_video(self, videos: list[tuple[Node, bool]], *, graphics: bool) -> None:
        """Place the first display, which libvirt adds if there are graphics."""
        if not videos:
            self._slots.video = graphics
        elif self._machine.video_slot is not None:
            first, waits = videos.pop(0)
            self._slots.video = waits and _model(first) not in ("none", "ramfb")

    # --- what a device needs

    def _virtio(self, model: str) -> Plug | None:
        if not self._slots.ours_by_default:
            return None  # all of them are on virtio-mmio
        return Plug.CONVENTIONAL if model == _TRANSITIONAL else Plug.EXPRESS

    def _plug(self, node: Node) -> Plug | None:
        reader: Callable[[Node], Plug | None] | None = getattr(self, f"_plug_{node.tag}", None)
        return reader(node) if reader is not None else self._virtio(node.get("model") or "")

    def _plug_interface(self, node: Node) -> Plug | None:
        model = _model(node)
        if node.get("type") == "hostdev" or model == "usb-net":
            return None
        if model.startswith("virtio"):
            return self._virtio(model)
        if model in ("e1000e", "igb") or (not model and not self._x86):
            return Plug.EXPRESS
        return Plug.CONVENTIONAL

    def _plug_sound(self, node: Node) -> Plug | None:
        model = node.get("model")
        if model in ("sb16", "pcspk", "usb", "ich7"):
            return None
        if model == "virtio":
            return self._virtio(model)
        if model == "ich9" and self._machine is Q35 and not self._slots.has(_Q35_SOUND):
            self._slots.note(PciAddress(slot=_Q35_SOUND), node.where)
            return None
        return Plug.CONVENTIONAL

    def _plug_disk(self, node: Node) -> Plug | None:
        target = node.child("target")
        on_virtio = target is not None and target.get("bus") == "virtio"
        return self._virtio(node.get("model") or "") if on_virtio else None

    def _plug_hostdev(self, node: Node) -> Plug | None:
        known = {"pci": Plug.EXPRESS, "mdev": Plug.EXPRESS}
        if node.get("type") == "scsi_host":
            return self._virtio(node.get("model") or "")
        return known.get(node.get("type") or "")

    def _plug_memballoon(self, node: Node) -> Plug | None:
        model = node.get("model") or ""
        return self._virtio(model) if model.startswith("virtio") else None

    def _plug_watchdog(self, node: Node) -> Plug | None:
        return Plug.CONVENTIONAL if node.get("model") == "i6300esb" else None

    def _plug_video(self, node: Node) -> Plug | None:
        model = _model(node)
        if model in ("none", "ramfb"):
            return None
        return self._virtio(model) if model == "virtio" else Plug.CONVENTIONAL

    def _plug_shmem(self, node: Node) -> Plug | None:
        return Plug.CONVENTIONAL

    def _plug_input(self, node: Node) -> Plug | None:
        on_virtio = node.get("bus") == "virtio"
        return self._virtio(node.get("model") or "") if on_virtio else None

    def _plug_serial(self, node: Node) -> Plug | None:
        target = node.child("target")
        on_pci = target is not None and target.get("type") == "pci-serial"
        return Plug.CONVENTIONAL if on_pci else None

    def _plug_iommu(self, node: Node) -> Plug | None:
        return self._virtio("") if node.get("model") == "virtio" else None

    def _plug_memory(self, node: Node) -> Plug | None:
        return self._virtio("") if (node.get("model") or "").startswith("virtio-") else None

    def _plug_panic(self, node: Node) -> Plug | None:
        return Plug.CONVENTIONAL if node.get("model") == "pvpanic" else None

    # --- controllers

    def _controllers(self, nodes: Iterable[tuple[Node, bool]]) -> tuple[list[Plug], list[Plug]]:
        """Return the plugs of the controllers before ours, and of those after ours.

        libvirt sorts them by type, and types by first occurrence. The controllers that it adds come
        last: that of the host's SCSI devices, USB, those of disks, and ours.
        """
        groups: dict[str, list[Plug]] = {}
        indices: dict[str, set[int]] = {}
        for node, waits in nodes:
            type_ = node.get("type") or ""
            group = groups.setdefault(type_, [])
            indices.setdefault(type_, set()).add(node.number("index") or 0)
            if waits and (plug := self._plug_controller(node)) is not None:
                group.append(plug)
        if "scsi" not in indices and self._x86 and self._has_scsi_hostdev():
            groups.setdefault("scsi", []).append(Plug.CONVENTIONAL)
            indices["scsi"] = {0}
        if 0 not in indices.get("usb", ()) and (plug := self._implied_usb()) is not None:
            groups.setdefault("usb", []).append(plug)
        for type_, count in self._implied_disk_controllers():
            missing = set(range(count)) - indices.get(type_, set())
            if type_ == "sata" and self._machine is Q35:
                missing.discard(0)
            groups.setdefault(type_, []).extend([Plug.CONVENTIONAL] * len(missing))
        groups.setdefault("virtio-serial", [])
        types = list(groups)
        ours = types.index("virtio-serial")
        before, after = types[:ours], types[ours + 1 :]
        return (
            [plug for type_ in before for plug in groups[type_]],
            [plug for type_ in after for plug in groups[type_]],
        )

    def _plug_controller(self, node: Node) -> Plug | None:
        type_, model, index = node.get("type"), node.get("model") or "", node.number("index") or 0
        if type_ == "usb":
            return self._plug_usb(node, model, index)
        if type_ == "ide":
            return None if index == 0 and self._machine is PC else Plug.CONVENTIONAL
        if type_ == "sata":
            return None if index == 0 and self._machine is Q35 else Plug.CONVENTIONAL
        if type_ == "nvme":
            return Plug.EXPRESS
        if type_ != "scsi" or model in ("ibmvscsi", "ncr53c90"):
            return None
        if model.startswith("virtio") or (not model and self._machine is VIRT):
            return self._virtio(model)
        return None if not model and self._machine is PSERIES else Plug.CONVENTIONAL

    def _plug_usb(self, node: Node, model: str, index: int) -> Plug | None:
        if model == "none" or (index == 0 and self._machine is PC and model in ("", "piix3-uhci")):
            return None
        if model.endswith("xhci") or (not model and not self._x86):
            return Plug.EXPRESS
        if not model.startswith("ich9-"):
            return Plug.CONVENTIONAL
        if index in self._usb_at_home:
            return None
        self._usb_at_home[index] = True
        if self._machine is Q35:
            for slot in _Q35_USB:
                if not self._slots.has(slot):
                    self._slots.note(PciAddress(slot=slot), node.where)
                    return None
        return Plug.CONVENTIONAL

    def _has_scsi_hostdev(self) -> bool:
        return any(node.get("type") == "scsi" for node in devices(self._root, "hostdev"))

    def _implied_usb(self) -> Plug | None:
        return Plug.EXPRESS if self._machine in (Q35, PSERIES, CONVENTIONAL) else None

    def _implied_disk_controllers(self) -> Iterator[tuple[str, int]]:
        """Yield types and numbers of controllers that disks need and that occupy a slot."""
        if not self._x86:
            return
        for type_, disks in sorted(_DISKS.items(), reverse=True):
            count = 0
            for node in devices(self._root, "disk"):
                target, address = node.child("target"), node.child("address")
                if target is None or target.get("bus") != type_:
                    continue
                index = _disk_number(target.get("dev") or "") // disks
                if address is not None:
                    index = address.number("controller") or 0
                count = max(count, index + 1)
            yield type_, min(count, 32)


def _model(node: Node) -> str:
    """Return the type of the ``<model>`` of an interface or a display."""
    model = node.child("model")
    return (model.get("type") or "") if model is not None else ""


def _disk_number(name: str) -> int:
    """Return the number in a disk's name (sdz: 25, sdaa: 26); 0 for any other name."""
    number = 0
    for letter in name[2:5] if re.fullmatch(r"[hsv]d[a-z]{1,3}", name) else "":
        number = number * 26 + ord(letter) - ord("a") + 1
    return max(number - 1, 0)
