"""A stock SPICE client, spice-gtk, as a process that JSON lines drive; runs under Debian's python3.

Each line of standard input is one command, an array of a name and arguments; each line of standard
output is one event, an array of a name and arguments. The process ends at the end of its input.
"""

import base64
import ctypes
import json
import os
import sys

import gi

gi.require_version("SpiceClientGLib", "2.0")
from gi.repository import Gio, GLib, GObject  # noqa: E402
from gi.repository import SpiceClientGLib as Spice  # noqa: E402

UTF8_TEXT = 1
LIBRARY = ctypes.CDLL("libspice-client-glib-2.0.so.8")


def connect_signal(obj, signal, callback):
    """Session and Channel hide GObject's own connect."""
    GObject.Object.connect(obj, signal, callback)


def copied(pointer, size):
    """The bytes at a pointer that a signal passed, as base64."""
    return base64.b64encode(ctypes.string_at(pointer, size) if size else b"").decode()


def emit(*event):
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


class Client:
    def __init__(self):
        self.session = None
        self.main = None
        self.port = None
        self.offers = {}
        self.cancellables = {}
        self.tasks = []
        self.kept = []

    # --- commands

    def do_connect(self, properties):
        self.session = Spice.Session()
        self.session.set_property("enable-audio", False)
        for name, value in properties.items():
            if value is not None:
                self.session.set_property(name, value)
        connect_signal(self.session, "channel-new", self.channel_new)
        connect_signal(self.session, "disconnected", lambda _: emit("disconnected"))
        emit("connecting", Spice.Session.connect(self.session))

    def do_disconnect(self):
        Spice.Session.disconnect(self.session)

    def do_resize(self, width, height):
        self.main.update_display_enabled(0, True, False)
        self.main.update_display(0, 0, 0, width, height, False)
        emit("resized", self.main.send_monitor_config())

    def do_grab(self, selection, text, repeat=1):
        self.offers[selection] = (text * repeat).encode()
        self.main.clipboard_selection_grab(selection, [UTF8_TEXT])

    def do_release(self, selection):
        self.offers.pop(selection, None)
        self.main.clipboard_selection_release(selection)

    def do_request(self, selection):
        self.main.clipboard_selection_request(selection, UTF8_TEXT)

    def do_send(self, name, path):
        cancellable = self.cancellables[name] = Gio.Cancellable()

        def finished(channel, result):
            try:
                channel.file_copy_finish(result)
                emit("sent", name)
            except GLib.Error as error:
                emit("not-sent", name, error.message)

        self.main.file_copy_async(
            [Gio.File.new_for_path(path)], Gio.FileCopyFlags.NONE, cancellable, None, None, finished
        )

    def do_cancel(self, name):
        self.cancellables[name].cancel()

    def do_write_port(self, data):
        """Not through gi, which frees the buffer before it is written."""
        buffer = base64.b64decode(data)
        self.kept.append(buffer)
        LIBRARY.spice_port_channel_write_async(
            ctypes.c_void_p(hash(self.port)), buffer, ctypes.c_size_t(len(buffer)), None, None, None
        )

    # --- signals

    def channel_new(self, session, channel):
        connect_signal(channel, "channel-event", self.channel_event)
        if isinstance(channel, Spice.MainChannel):
            self.main = channel
            connect_signal(channel, "main-agent-update", self.agent_update)
            connect_signal(channel, "main-clipboard-selection-grab", self.grabbed)
            connect_signal(channel, "main-clipboard-selection-request", self.requested)
            connect_signal(channel, "main-clipboard-selection-release", self.released)
            connect_signal(channel, "main-clipboard-selection", self.received)
            connect_signal(channel, "new-file-transfer", self.transfer_begins)
            return
        if isinstance(channel, Spice.PortChannel):
            self.port = channel
            connect_signal(channel, "port-data", self.port_data)
            connect_signal(channel, "notify::port-opened", self.port_opened)
        if isinstance(channel, (Spice.PortChannel, Spice.WebdavChannel)):
            Spice.Channel.connect(channel)
        emit("channel", type(channel).__name__)

    def channel_event(self, channel, event):
        emit("channel-event", type(channel).__name__, event.value_nick)

    def agent_update(self, channel):
        # The property keeps what the agent before said until the new one has announced itself.
        known = any(channel.agent_test_capability(number) for number in range(32))
        emit(
            "agent",
            channel.get_property("agent-connected"),
            channel.get_property("agent-caps-0") if known else 0,
        )

    def grabbed(self, channel, selection, types, count):
        emit("grabbed", selection, types)
        return True

    def requested(self, channel, selection, type_):
        data = self.offers.get(selection, b"")
        emit("requested", selection, type_)
        channel.clipboard_selection_notify(selection, type_ if data else 0, data)
        return True

    def released(self, channel, selection):
        emit("released", selection)

    def received(self, channel, selection, type_, data, size):
        emit("received", selection, type_, copied(data, size))

    def transfer_begins(self, channel, task):
        self.tasks.append(task)
        connect_signal(task, "notify::progress", self.transfer_goes_on)

    def transfer_goes_on(self, task, _):
        emit("progress", task.get_filename(), task.get_transferred_bytes())

    def port_opened(self, channel, _):
        emit("port-opened", channel.get_property("port-name"), channel.get_property("port-opened"))

    def port_data(self, channel, data, size):
        emit("port-data", copied(data, size))


def main():
    client = Client()
    loop = GLib.MainLoop()
    pending = bytearray()

    def readable(fd, _):
        data = os.read(fd, 1 << 20)
        if not data:
            loop.quit()
            return False
        pending.extend(data)
        *lines, rest = bytes(pending).split(b"\n")
        pending[:] = rest
        for line in lines:
            name, *arguments = json.loads(line)
            getattr(client, f"do_{name}")(*arguments)
        return True

    GLib.io_add_watch(
        0, GLib.PRIORITY_DEFAULT, GLib.IOCondition.IN | GLib.IOCondition.HUP, readable
    )
    emit("ready")
    loop.run()


main()
