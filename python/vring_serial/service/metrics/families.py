"""The families of metrics, with Prometheus's names and units."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from vring_serial.device.console.traffic import Traffic
from vring_serial.service.metrics.readings import VmReading

#: What a client says that takes OpenMetrics.
OPENMETRICS = "application/openmetrics-text"

_VM = ("vm",)
_CONTROLLER = ("vm", "controller")
_PORT = ("vm", "controller", "port")
_DIRECTION = (*_PORT, "direction")

#: Of one direction of a port: the attribute of its traffic, the metric, and what it counts.
_FLOWS = (
    ("bytes", "vring_port_bytes", "Bytes moved between guest and host end"),
    ("chains", "vring_port_chains", "Buffers of the driver that were used"),
    ("kicks", "vring_port_kicks", "Notifications that the driver sent"),
    ("calls", "vring_port_calls", "Interrupts that the driver got"),
    ("calls_saved", "vring_port_calls_suppressed", "Interrupts that the driver did not need"),
)


def render(vms: Sequence[VmReading], version: str, *, openmetrics: bool) -> tuple[bytes, str]:
    """Return the metrics as text, and the type of its contents.

    Args:
        vms: what is known of each VM.
        version: ours.
        openmetrics: whether the text is OpenMetrics, instead of Prometheus's own format.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Readings(vms, version))
    encode, content_type = choose_encoder(OPENMETRICS if openmetrics else "")
    return encode(registry), content_type


class _Readings(Collector):
    def __init__(self, vms: Sequence[VmReading], version: str) -> None:
        self._vms = vms
        self._version = version

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily(
            "vring_build_info", "The version of vring that serves", labels=("version",)
        )
        build.add_metric((self._version,), 1)
        yield build
        yield from self._of_vms()
        yield from self._of_controllers()
        yield from self._of_ports()

    def _of_vms(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("vring_worker_up", "Whether the worker of a VM answered", labels=_VM)
        restarts = CounterMetricFamily(
            "vring_worker_restarts", "Workers that served a VM before the present one", labels=_VM
        )
        for vm in self._vms:
            up.add_metric((vm.name,), vm.restarts is not None)
            if vm.restarts is not None:
                restarts.add_metric((vm.name,), vm.restarts)
        yield from (up, restarts)

    def _of_controllers(self) -> Iterator[Metric]:
        connected = GaugeMetricFamily(
            "vring_frontend_connected", "Whether a frontend is connected", labels=_CONTROLLER
        )
        connects = CounterMetricFamily(
            "vring_frontend_connections",
            "Frontends that the present worker began to serve",
            labels=_CONTROLLER,
        )
        broken = GaugeMetricFamily(
            "vring_controller_needs_reset",
            "Whether the driver broke the device, which waits for a reset",
            labels=_CONTROLLER,
        )
        for vm in self._vms:
            for controller in vm.controllers:
                labels = (vm.name, controller.id)
                connected.add_metric(labels, controller.frontend)
                connects.add_metric(labels, controller.frontend_connects)
                broken.add_metric(labels, controller.needs_reset)
        yield from (connected, connects, broken)

    def _of_ports(self) -> Iterator[Metric]:
        info = GaugeMetricFamily(
            "vring_port_info",
            "Name, host end and kind of a port",
            labels=(*_PORT, "name", "chardev", "kind"),
        )
        guest = GaugeMetricFamily(
            "vring_port_guest_open", "Whether the guest has the port open", labels=_PORT
        )
        host = GaugeMetricFamily(
            "vring_port_host_connected", "Whether the host end is connected", labels=_PORT
        )
        connects = CounterMetricFamily(
            "vring_port_host_connections",
            "Host ends that the present worker began to serve",
            labels=_PORT,
        )
        dropped = CounterMetricFamily(
            "vring_port_dropped_bytes",
            "Bytes of the guest that a console's host end did not take",
            labels=_PORT,
        )
        throttled = CounterMetricFamily(
            "vring_port_throttled_seconds",
            "Time for which the slower side held the other one up",
            labels=_DIRECTION,
        )
        flows = [CounterMetricFamily(name, text, labels=_DIRECTION) for _, name, text in _FLOWS]
        for vm in self._vms:
            for controller in vm.controllers:
                for port in controller.ports:
                    labels = (vm.name, controller.id, str(port.nr))
                    kind = "console" if port.console else "port"
                    info.add_metric((*labels, port.name, port.chardev, kind), 1)
                    guest.add_metric(labels, port.guest_open)
                    host.add_metric(labels, port.host_open)
                    connects.add_metric(labels, port.host_connects)
                    dropped.add_metric(labels, port.out.dropped)
                    for direction, flow in (("out", port.out), ("in", port.back)):
                        throttled.add_metric((*labels, direction), flow.throttled_ns / 1e9)
                        _add_flow(flows, (*labels, direction), flow)
        yield from (info, guest, host, connects, dropped, throttled, *flows)


def _add_flow(
    flows: Iterable[CounterMetricFamily], labels: Sequence[str], traffic: Traffic
) -> None:
    for family, (attribute, _, _) in zip(flows, _FLOWS, strict=True):
        family.add_metric(labels, getattr(traffic, attribute))
