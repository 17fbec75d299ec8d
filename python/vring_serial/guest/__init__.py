"""The embedded guest (RAM, a virtio-console driver, asyncio streams), and User-Mode Linux."""
