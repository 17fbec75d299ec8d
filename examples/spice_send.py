#!/usr/bin/python3
"""Send files into the guest as a stock SPICE client does when they are dropped on its window.

Needs Debian's python3-gi and gir1.2-spiceclientglib-2.0, and neither vring nor a display.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

try:
    import gi

    gi.require_version("SpiceClientGLib", "2.0")
except (ImportError, ValueError) as error:
    sys.exit(f"spice_send: {error}: install python3-gi and gir1.2-spiceclientglib-2.0")
from gi.repository import Gio, GLib, GObject, SpiceClientGLib


def port_number(text: str) -> str:
    """Return ``text`` if it is the number of a TCP port; raise ValueError otherwise."""
    if not 0 < int(text) < 65536:
        raise ValueError
    return text


def password_in(path: str) -> str:
    """Return the first line of a file. Raises ArgumentTypeError if it cannot be read."""
    try:
        return pathlib.Path(path).read_text().partition("\n")[0]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise argparse.ArgumentTypeError(f"{path}: {why}") from None


def existing_file(path: str) -> str:
    """Return the path of a regular file; raise ArgumentTypeError for any other."""
    if not pathlib.Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{path}: there is no such file")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", required=True, type=port_number)
    parser.add_argument("--password-file", dest="password", metavar="FILE", type=password_in)
    parser.add_argument("files", nargs="+", type=existing_file)
    arguments = parser.parse_args()

    loop = GLib.MainLoop()
    failures: list[str] = []
    sending: list[bool] = []
    session = SpiceClientGLib.Session(host=arguments.host, port=arguments.port)
    if arguments.password is not None:
        session.set_property("password", arguments.password)

    def end(*why: str) -> bool:
        failures.extend(why)
        loop.quit()
        return False

    def sent(channel: SpiceClientGLib.MainChannel, result: Gio.AsyncResult) -> None:
        try:
            channel.file_copy_finish(result)
        except GLib.Error as error:
            end(error.message)
        else:
            end()

    def agent_changed(channel: SpiceClientGLib.MainChannel) -> None:
        # The agent is there, and has told what it can do.
        ready = channel.get_property("agent-connected") and channel.get_property("agent-caps-0")
        if ready and not sending:
            sending.append(True)
            files = [Gio.File.new_for_path(name) for name in arguments.files]
            channel.file_copy_async(files, Gio.FileCopyFlags.NONE, None, None, None, sent)

    def channel_event(channel: SpiceClientGLib.Channel, event: object) -> None:
        if event != SpiceClientGLib.ChannelEvent.OPENED:
            end(f"the connection ended: {event.value_nick}")  # type: ignore[attr-defined]

    def channel_new(_: SpiceClientGLib.Session, channel: SpiceClientGLib.Channel) -> None:
        if isinstance(channel, SpiceClientGLib.MainChannel):
            GObject.Object.connect(channel, "channel-event", channel_event)
            GObject.Object.connect(channel, "main-agent-update", agent_changed)

    # Session and Channel have a connect of their own, which hides that of GObject.
    GObject.Object.connect(session, "channel-new", channel_new)
    GLib.timeout_add_seconds(60, end, "no agent, or no end, in 60 seconds")
    SpiceClientGLib.Session.connect(session)
    loop.run()
    if failures:
        sys.exit(f"spice_send: {failures[0]}")
    print("sent:", *arguments.files)


if __name__ == "__main__":
    main()
