"""What each end of a channel does when the two meet: announce its capabilities, and ask for theirs.

An end that asks begins a session: serials count from 0, and nothing of before is owed any more. The
channel need not close in between: an agent that is restarted in a paused guest, or the next client
of a SPICE server, asks anew on the channel that is open.
"""

from __future__ import annotations

from vring_serial.agent.channel.link import AgentLink
from vring_serial.agent.errors import AgentError
from vring_serial.proto.agent import AnnounceCapabilities, Capabilities


class Handshake:
    """One end's connection to the other, over any number of connections one after another.

    Args:
        local: what this end announces.

    Attributes:
        local: the same; a change counts from the next announcement on.
        remote: what the other end announced last, or None while there is nothing that counts.
        link: the connection, or None.
    """

    def __init__(self, local: Capabilities) -> None:
        self.local = local
        self.remote: Capabilities | None = None
        self.link: AgentLink | None = None
        self._is_asking = False

    def link_up(self, link: AgentLink) -> bool:
        """Use this connection and close the one before; return whether it is another one."""
        if link is self.link:
            return False
        if self.link is not None:
            self.link.fail(AgentError("another connection took over the agent channel"))
        self.link = link
        self.remote = None
        return True

    def link_down(self, link: AgentLink) -> bool:
        """Forget this connection; return whether it was the one in use."""
        if link is not self.link:
            return False
        self.link = self.remote = None
        return True

    def has(self, capability: int) -> bool:
        """Return whether the other end has announced a capability."""
        return self.remote is not None and capability in self.remote

    def ask(self) -> None:
        """Announce what this end can do, and ask the other for the same."""
        self._is_asking = True
        self._announce(request=True)

    def answer(self) -> None:
        """Announce what this end can do."""
        self._announce(request=False)

    def _announce(self, *, request: bool) -> None:
        if self.link is not None:
            self.link.post(AnnounceCapabilities(request, self.local))

    def receive(self, message: AnnounceCapabilities) -> bool:
        """Take the other end's announcement, and answer if it asks.

        Returns whether it asks after it had answered: it has started anew on the same channel, and
        the caller begins a session and asks, which is the answer as well.
        """
        self.remote = message.capabilities
        if not message.request:
            self._is_asking = False
        elif not self._is_asking:
            return True
        else:
            self.answer()
        return False

    def refuse(self) -> None:
        """Take an announcement that there is no agent at the other end."""
        self.remote = None
        self._is_asking = False
