"""The vfio-user server: a virtio PCI function, served to clients over a unix socket."""
