"""What the processes that serve VMs give up, as their configurations say."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vring_serial.config.vms import VmConfig
from vring_serial.errors import ConfigError
from vring_serial.service.sandbox import Sandbox

#: What the process of a VM gives up if nothing is said.
DEFAULT_SANDBOX = "on"


def sandbox_of(vms: Sequence[VmConfig]) -> Sandbox:
    """Return the sandbox of a process that serves these. Raises ConfigError if theirs differ."""
    found = [(vm, _of_one(vm)) for vm in vms]
    first, sandbox = found[0]
    for vm, other in found:
        if other != sandbox:
            key = "user" if other.account != sandbox.account else "sandbox"
            raise ConfigError(f"differs from that of {first.name}, in one process", vm.where(key))
    return sandbox


def _of_one(vm: VmConfig) -> Sandbox:
    try:
        text = vm.sandbox or os.environ.get("VRING_SANDBOX") or DEFAULT_SANDBOX
        return Sandbox.parse(text, vm.user)
    except ConfigError as error:
        key = "user" if error.where.startswith("--user") else "sandbox"
        raise ConfigError(error.why, vm.places.get(key, error.where)) from None
