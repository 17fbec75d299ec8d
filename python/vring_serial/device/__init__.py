"""The device itself: controller, ports, and how bytes move between queues and host ends."""
