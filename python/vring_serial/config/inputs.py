"""What the configuration was read from.

An upgrade changes the code of a service and not its configuration, and standard input cannot be
read twice.
"""

from __future__ import annotations

from collections.abc import Mapping

from vring_serial.config.domain_xml import read_file


class Inputs:
    """Reads each file of the configuration once, also if the process changes its code meanwhile.

    Args:
        known: what was read before.

    Attributes:
        known: contents by path, as it was given; ``-`` is standard input.
    """

    def __init__(self, known: Mapping[str, bytes] | None = None) -> None:
        self.known = dict(known or {})

    def read(self, path: str) -> bytes:
        """Return what is in a file. Raises ResourceError."""
        if path not in self.known:
            self.known[path] = read_file(path)
        return self.known[path]
