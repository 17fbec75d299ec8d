"""What a vfio-user client is offered, and what is agreed on with it."""

from __future__ import annotations

from vring_serial.proto.framing import MAX_FDS
from vring_serial.proto.vfio_user_version import MAJOR, MINOR, Capabilities, Version
from vring_serial.proto.vfio_user_wire import DEFAULT_DATA_XFER_SIZE
from vring_serial.transport.session import FatalError
from vring_serial.transport.vfio_user.state import MAX_DMA_MAPS, MIN_DATA_XFER_SIZE

_OFFERED = Capabilities(
    max_msg_fds=MAX_FDS,
    max_data_xfer_size=DEFAULT_DATA_XFER_SIZE,
    max_dma_maps=MAX_DMA_MAPS,
    # Any page size will do: nothing here depends on it.
    pgsizes=(1 << 64) - 4096,
    write_multiple=True,
    twin_socket=True,
    named=frozenset(
        {
            "max_msg_fds",
            "max_data_xfer_size",
            "max_dma_maps",
            "pgsizes",
            "write_multiple",
            "twin_socket",
        }
    ),
)


def agree(version: Version) -> Capabilities:
    """Return what client and server can both do. Raises FatalError: one of them cannot serve."""
    if version.major != MAJOR:
        raise FatalError(f"version {version.major}.{version.minor} instead of {MAJOR}.{MINOR}")
    proposed = version.capabilities or Capabilities()
    if version.capabilities is not None and proposed.pgsizes % 4096:
        raise FatalError(f"page sizes {proposed.pgsizes:#x}, below 4096")
    if proposed.max_data_xfer_size < MIN_DATA_XFER_SIZE:
        raise FatalError(
            f"max_data_xfer_size {proposed.max_data_xfer_size}, below {MIN_DATA_XFER_SIZE}"
        )
    return _OFFERED.common(proposed)
