"""Files of results: written, read back, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vring_serial.bench.results import Report, Result, this_machine
from vring_serial.bench.tables import comparison, size_name
from vring_serial.errors import ConfigError, ResourceError


def result(*samples: float, unit: str = "GB/s", what: str = "guest to host") -> Result:
    return Result("transfer", what, "split", 1, 64, unit, samples, {"CPU s/GiB": 0.5})


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = str(tmp_path / "a.json")
    report = Report([result(1.0, 3.0, 2.0)], this_machine())
    report.save(path)
    loaded = Report.load(path)
    assert loaded.machine == report.machine
    assert loaded.results[0].key == ("transfer", "guest to host", "split", 1, 64)
    assert loaded.results[0].samples == [1.0, 3.0, 2.0]
    assert loaded.results[0].median == 2.0
    assert loaded.results[0].notes == {"CPU s/GiB": 0.5}


def test_percentiles() -> None:
    hundred = result(*range(100, 0, -1))
    assert [hundred.percentile(p) for p in (0, 50, 99, 99.9)] == [1, 51, 100, 100]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"format": "vring-bench/0"}',
        b'{"format": "vring-bench/1"}',
        b'{"format": "vring-bench/1", "machine": {}, "results": [{}]}',
        b'{"format": "vring-bench/1", "machine": {}, "results": [3]}',
        b'{"format": "vring-bench/1", "machine": 3, "results": []}',
        b"\xff\xfe",
    ],
)
def test_a_file_that_is_something_else_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.json: "):
        Report.load(str(path))


def test_a_result_without_samples_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    Report([result(1.0)]).save(str(path))
    document = json.loads(path.read_text())
    document["results"][0]["samples"] = []
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="no samples"):
        Report.load(str(path))


def test_files_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="No such file"):
        Report.load(str(tmp_path / "none"))
    with pytest.raises(ResourceError, match="Is a directory"):
        Report([]).save(str(tmp_path))


def verdicts(before: Result, after: Result) -> list[str]:
    table, count = comparison(Report([before]), Report([after]))
    assert count == table.row_count
    return [str(cell) for cell in table.columns[-1].cells]


def test_comparison_says_which_is_better_whatever_the_unit() -> None:
    assert verdicts(result(1.0), result(2.0)) == ["[green]100% faster[/]"]
    assert verdicts(result(2.0), result(1.0)) == ["[red]100% slower[/]"]
    assert verdicts(result(1.0), result(1.02)) == ["the same"]
    assert verdicts(result(1.0, unit="us"), result(2.0, unit="us")) == ["[red]100% slower[/]"]
    assert verdicts(result(2.0, unit="us"), result(1.0, unit="us")) == ["[green]100% faster[/]"]
    assert verdicts(result(1.0), result(1.0, what="host to guest")) == []
    assert verdicts(result(1.0), result(1.0, unit="us")) == []


def test_sizes_in_words() -> None:
    assert [size_name(n) for n in (64, 1000, 1024, 1536, 65536, 1 << 20)] == [
        "64 B",
        "1000 B",
        "1 KiB",
        "1536 B",
        "64 KiB",
        "1 MiB",
    ]
