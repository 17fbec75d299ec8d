# Kicks and calls that cannot block, whatever the peer does to the descriptor.

# Write 8 bytes to an eventfd or a socket, trying first the kind that `is_socket` says; return
# whether it is a socket. A full one has notified already; a file of another kind gets nothing.
cdef bint notify_any(int fd, bint is_socket) noexcept nogil
