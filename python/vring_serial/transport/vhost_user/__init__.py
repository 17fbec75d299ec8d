"""The vhost-user backend: any virtio device, served to frontends over a unix socket."""
