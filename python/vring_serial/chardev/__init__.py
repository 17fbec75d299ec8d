"""Host ends of ports: sockets, ptys, files, pipes, standard streams, memory, Python code."""
