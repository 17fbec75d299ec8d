"""The embedded guest: RAM, a virtio-console driver and a SPICE guest agent in one process."""
