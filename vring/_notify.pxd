# Kicks and calls that cannot block, whatever the peer does to the descriptor.

# Eight bytes to an eventfd or a socket, tried first as what `is_socket` says; whether it is a
# socket. One that is full has told already; what is neither gets nothing.
cdef bint notify_any(int fd, bint is_socket) noexcept nogil
