"""What the user asks for, as dataclasses: from libvirt domain XML and QEMU-style options."""
