"""Any virtio device, the console device, and the registers a driver sees it through."""
