"""The configuration as dataclasses, read from libvirt domain XML and QEMU-style options."""
