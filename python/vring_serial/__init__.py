"""A complete multiport virtio-serial device, and what the SPICE agent channel needs on it."""
