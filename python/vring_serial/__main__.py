"""``python -m vring_serial`` is the command ``vring``."""

from vring_serial.cli import main

main()
