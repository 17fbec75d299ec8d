# Kicks and calls that cannot block, whatever the peer does to the descriptor.

# Eight bytes to an eventfd, or to a pipe of our own. One that is full has told already.
cdef void notify_eventfd(int fd) noexcept nogil
# The same to a socket; False if it is none.
cdef bint notify_socket(int fd) noexcept nogil
