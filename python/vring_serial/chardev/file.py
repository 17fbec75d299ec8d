"""file: the guest's output goes to a file; optionally its input comes from another."""

from __future__ import annotations

from dataclasses import dataclass

from vring_serial.chardev.options import Options, check_path


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions(Options):
    """Options of file.

    Attributes:
        path: where the guest's output goes; made if it does not exist.
        append: keep what is in the file already; otherwise it is emptied first.
        input_path: where the guest's input comes from; "" for none.
    """

    path: str = ""
    append: bool = False
    input_path: str = ""

    def __post_init__(self) -> None:
        check_path("path", self.path)
        if self.input_path:
            check_path("input-path", self.input_path)
