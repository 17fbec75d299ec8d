"""The console device: controller, ports, and how bytes move between queues and host ends."""
