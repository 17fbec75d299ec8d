"""``vring serve``: devices of VMs from a file, a domain XML or options, until stopped."""

from __future__ import annotations

import logging
from typing import Any

import click
from click.core import ParameterSource

from vring_serial.cli import interrupts_end_at_once, limits, logs
from vring_serial.cli.access import parse_access
from vring_serial.cli.sandboxes import sandbox_of
from vring_serial.cli.signals import run
from vring_serial.cli.vm_options import service_of, service_options
from vring_serial.config.vms import ServiceConfig, VmConfig
from vring_serial.service.metrics.option import check_libraries, parse_metrics
from vring_serial.service.monitored import Monitored
from vring_serial.service.qmp.option import parse_qmp
from vring_serial.service.sandbox import Sandbox
from vring_serial.unix_socket import set_access


@click.command("serve")
@service_options
@click.option(
    "--keeper/--no-keeper",
    default=True,
    help="Hold sockets, files and state in a process of its own, so that those that serve may die, "
    "and others go on (docs/restart.md). This is the default; with --no-keeper one process serves.",
)
@click.option(
    "--descriptor-store",
    is_flag=True,
    help="Without a keeper: have the service manager (systemd) keep sockets, files and state "
    "(docs/systemd.md).",
)
def serve_command(keeper: bool, descriptor_store: bool, **given: Any) -> None:
    """Serve virtio-serial devices over vhost-user or vfio-user until SIGINT or SIGTERM.

    VMs come from a TOML file; or their ports come from a libvirt domain XML, from QEMU-style
    options, or from both.

    \b
      vring serve --vhost-user /run/vring.sock --domain examples/spice-agent.xml
      vring serve --vhost-user /run/vring.sock \\
          --chardev socket,id=agent,path=/run/agent.sock,server=on,wait=off \\
          --port chardev=agent,nr=1,name=com.redhat.spice.0
      vring serve --vhost-user /run/vring.sock --chardev spicevmc,id=agent --port chardev=agent \\
          --spice port=5930,addr=127.0.0.1,disable-ticketing=on
      vring serve --vfio-user /run/vring.sock --chardev socket,id=c,path=/run/c.sock,server=on \\
          --port chardev=c,nr=1,name=org.example.data
      vring serve --config /etc/vring.toml
    """
    if descriptor_store:
        source = click.get_current_context().get_parameter_source("keeper")
        if keeper and source is ParameterSource.COMMANDLINE:
            raise click.UsageError("Give either --keeper or --descriptor-store, and not both.")
        keeper = False
    if keeper:
        limits.prepare_keeper()
    with interrupts_end_at_once():
        from vring_serial.cli.origin import find_origin
    origin = find_origin()
    service = service_of(given, origin.inputs.read)
    for option in ("qmp", "metrics", "workers"):
        of_vms = option == "qmp" and any(vm.qmp for vm in service.vms)
        if (getattr(service, option) or of_vms) and not keeper:
            raise click.UsageError(
                f"--{option} needs the keeper, which --no-keeper and --descriptor-store leave out."
            )
    log = logs.LogSettings(service.log_level or "info", bool(service.json_log), service.log_file)
    shares, sandboxes, monitored = check(service, keeper=keeper)
    if monitored.metrics:
        check_libraries()
    set_access(parse_access(service.socket_mode, service.socket_owner, service.socket_group))
    logs.configure(log.level, as_json=log.as_json, path=log.path)
    warnings = service.warnings
    if not keeper:
        for warning in warnings:
            logs.emit(logging.WARNING, "configuration", warning)

    # Imported only now, so that mistakes are reported without loading the device.
    with interrupts_end_at_once():
        from vring_serial.cli.server import Settings, serve

    if keeper:
        from vring_serial.cli.kept import serve_kept

        each = [Settings(None, service.log_file, sandbox) for sandbox in sandboxes]
        status = serve_kept(shares, each, service.pid_file, log, warnings, monitored, origin)
        raise SystemExit(status)
    settings = Settings(service.pid_file, service.log_file, sandboxes[0])
    if descriptor_store:
        from vring_serial.cli.stored import serve_stored

        run(serve_stored(service.vms, settings, origin))
        return
    run(serve(service.vms, settings))


def check(
    service: ServiceConfig, *, keeper: bool
) -> tuple[list[tuple[VmConfig, ...]], list[Sandbox], Monitored]:
    """Return the VMs of each process, its sandbox, and where monitors listen.

    Raises ConfigError.
    """
    shares = [service.vms]
    if keeper and service.workers != "shared":
        shares = [(vm,) for vm in service.vms]
    monitored = Monitored(
        tuple(parse_qmp(text, service.where("qmp", i)) for i, text in enumerate(service.qmp)),
        tuple(
            parse_metrics(text, service.where("metrics", i))
            for i, text in enumerate(service.metrics)
        ),
        {
            vm.name: tuple(parse_qmp(text, vm.where("qmp", text)) for text in vm.qmp)
            for vm in service.vms
            if vm.qmp
        },
    )
    return shares, [sandbox_of(vms) for vms in shares], monitored
