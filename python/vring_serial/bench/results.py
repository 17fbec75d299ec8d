"""Results of measurements, written to a file and read back."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vring_serial.errors import ConfigError, ResourceError

#: First key of a file, with the version of the format.
FORMAT = "vring-bench/1"
#: Maximum size of a file that is read, in bytes.
MAX_FILE = 64 << 20
#: Description of the method of measurement.
METHOD = (
    "device, guest and peer are processes of their own: vring serve on a vhost-user socket, "
    "the embedded guest's driver, and whoever is connected to the port's socket"
)


@dataclass(frozen=True, slots=True)
class Result:
    """The samples of one measurement.

    Attributes:
        group: ``transfer``, ``latency`` or ``rings``.
        what: the workload, such as ``guest to host``.
        ring: ``split`` or ``packed``; "" for yardsticks without rings.
        ports: number of ports that worked at the same time.
        size: size of a message in bytes.
        unit: unit of the samples: ``GB/s``, ``us`` or ``ns``.
        samples: the samples in order of measurement.
        notes: further numbers by name, such as ``CPU s/GiB``.
    """

    group: str
    what: str
    ring: str
    ports: int
    size: int
    unit: str
    samples: Sequence[float]
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """Key that is equal for comparable results."""
        return self.group, self.what, self.ring, self.ports, self.size

    @property
    def median(self) -> float:
        """Median of the samples."""
        return statistics.median(self.samples)

    @property
    def more_is_better(self) -> bool:
        """Whether larger figures are better: rates, as opposed to times."""
        return self.unit.endswith("/s")

    def percentile(self, percent: float) -> float:
        """Return the sample that ``percent`` of all samples do not exceed."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


@dataclass(frozen=True, slots=True)
class Report:
    """All results of a run, and the machine.

    Attributes:
        results: in the order of measurement.
        machine: properties of the machine by name (processor, kernel, versions), as in the JSON
            file.
    """

    results: Sequence[Result]
    machine: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str) -> None:
        """Write the report to a JSON file. Raises ResourceError."""
        document = {
            "format": FORMAT,
            "method": METHOD,
            "machine": self.machine,
            "results": [_dump(result) for result in self.results],
        }
        try:
            Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ResourceError(f"{path}: {error.strerror}") from None

    @classmethod
    def load(cls, path: str) -> Report:
        """Read a file of :meth:`save`. Raises ResourceError, or ConfigError for other contents."""
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_FILE + 1)
        except OSError as error:
            raise ResourceError(f"{path}: {error.strerror}") from None
        if len(data) > MAX_FILE:
            raise ConfigError(f"more than {MAX_FILE >> 20} MiB", path)
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"not JSON: {error}", path) from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ConfigError(f"not a file of `vring bench --json` ({FORMAT})", path)
        try:
            results = [_parse(entry) for entry in document["results"]]
            machine = dict(document["machine"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"a result is incomplete: {error!r}", path) from None
        return cls(results, machine)


def _dump(result: Result) -> dict[str, Any]:
    entry = asdict(result)
    entry["samples"] = [float(f"{sample:.4g}") for sample in result.samples]
    entry["notes"] = {name: float(f"{value:.4g}") for name, value in result.notes.items()}
    return entry


def _parse(entry: dict[str, Any]) -> Result:
    samples = [float(sample) for sample in entry["samples"]]
    if not samples:
        raise ValueError("no samples")
    return Result(
        str(entry["group"]),
        str(entry["what"]),
        str(entry["ring"]),
        int(entry["ports"]),
        int(entry["size"]),
        str(entry["unit"]),
        samples,
        {str(name): float(value) for name, value in entry["notes"].items()},
    )


def this_machine() -> dict[str, Any]:
    """Return the properties of this machine on which results depend."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown")
