"""Protocols without input or output.

A parser of a stream takes bytes with ``receive_data`` and hands out what they contain with
``next_message`` or ``next_event``, until more bytes are needed. What receives whole messages (the
control queues) takes one with ``receive_message`` and returns the events it caused. Types on the
wire have ``pack()`` and ``unpack(data)``, which raises RemoteProtocolError. Descriptors are opaque
integers.
"""
