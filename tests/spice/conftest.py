"""The binding needs the library; its options do not."""

from __future__ import annotations

from pathlib import Path

import pytest

WITHOUT_LIBRARY = ("test_options.py", "test_listener.py", "test_missing.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.path.name not in WITHOUT_LIBRARY:
            item.add_marker(pytest.mark.peer("libspice-server.so.1"))
