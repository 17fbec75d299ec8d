"""Another virtio device on the same core: an entropy device (virtio 1.3, 5.4).

    python examples/custom_device.py --vfio-user /tmp/rng.sock
    python examples/custom_device.py --vhost-user /tmp/rng.sock

A Linux guest reads it as /dev/hwrng. Under QEMU 10.1 or later, with memory that can be shared
(-object memory-backend-memfd,id=mem,size=256M,share=on -machine q35,memory-backend=mem):

    -device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/tmp/rng.sock"}}'

or, over vhost-user:

    -chardev socket,id=rng,path=/tmp/rng.sock
    -device vhost-user-test-device-pci,chardev=rng,virtio-id=4,num_vqs=1
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys

from vring_serial import (
    QueueDevice,
    QueueDeviceState,
    RunningQueue,
    StateFormat,
    VfioUserServer,
    VhostUserBackend,
    VringSerialError,
)

ENTROPY_DEVICE = 4
#: A driver may ask for gigabytes with one buffer; it gets less, which it must expect.
BUFFER_MAX = 64 * 1024


class Entropy(QueueDevice):
    """One queue; the device fills whatever buffers come with random bytes."""

    #: For snapshots: this device remembers nothing but what every device does.
    state_format = StateFormat("entropy device", 1, QueueDeviceState)

    def __init__(self) -> None:
        super().__init__("entropy0", ENTROPY_DEVICE, num_queues=1)

    def serve(self, index: int, running: RunningQueue) -> bool:
        notify = False
        for _ in range(16):
            chain = running.queue.pop()
            if chain is None:
                if running.queue.enable_notifications():
                    continue
                break
            chain.write(os.urandom(min(chain.writable_bytes, BUFFER_MAX)))
            notify |= running.queue.push(chain)
        if notify:
            running.call()
        return chain is not None


async def main() -> None:
    parser = argparse.ArgumentParser(description="An entropy device for a virtual machine.")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--vfio-user", metavar="SOCKET", help="a whole PCI device, for QEMU 10.1")
    way.add_argument("--vhost-user", metavar="SOCKET", help="behind a frontend's own registers")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = options.vhost_user if options.vfio_user is None else options.vfio_user
    kind = VhostUserBackend if options.vfio_user is None else VfioUserServer
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with kind(Entropy(), path):
        await stop.wait()


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except VringSerialError as error:
        sys.exit(f"custom_device: {error}")
