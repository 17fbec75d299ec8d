"""The process of the command ``vring``, also started as ``python -m vring_serial``."""

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run the command. Until it handles SIGINT itself, SIGINT ends the process silently."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from vring_serial import cli

    cli.main()


if __name__ == "__main__":
    main()
