"""vring_serial: a complete multiport virtio-serial device and all that the SPICE agent needs on it."""
