"""Ways for an emulator to reach the device: vhost-user, vfio-user, in process."""
