"""Register models: what a driver sees of a virtio device through MMIO or PCI."""
