# Kicks and calls that cannot block, whatever the peer does to the descriptor.

# Eight bytes to an eventfd, a socket or a pipe. One that is full has told already.
cdef void notify_c(int fd) noexcept nogil
# The same for what is known to be an eventfd.
cdef void notify_eventfd(int fd) noexcept nogil
