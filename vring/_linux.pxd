# Declarations of Linux and POSIX threads for the data plane, all nogil.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from vring._wire cimport iovec

cdef extern from "<errno.h>" nogil:
    int errno
    enum:
        EPERM, EINTR, EIO, EAGAIN, ENOMEM, EFAULT, EINVAL, EPIPE, ECONNRESET
        ENOSYS, ENOTSOCK, EOPNOTSUPP

cdef extern from "<limits.h>" nogil:
    enum:
        IOV_MAX

cdef extern from "<unistd.h>" nogil:
    ssize_t read(int fd, void* buffer, size_t n)
    ssize_t write(int fd, const void* buffer, size_t n)
    int close(int fd)
    int getpid()
    int isatty(int fd)
    enum:
        SEEK_CUR, SEEK_END
    int64_t lseek(int fd, int64_t offset, int whence)

cdef extern from "<sys/uio.h>" nogil:
    ssize_t readv(int fd, const iovec* segments, int n)
    ssize_t writev(int fd, const iovec* segments, int n)

cdef extern from "<sys/socket.h>" nogil:
    enum:
        MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK, SOL_SOCKET, SO_TYPE, SOCK_STREAM
    ssize_t send(int fd, const void* buffer, size_t n, int flags)
    ssize_t recv(int fd, void* buffer, size_t n, int flags)
    int getsockopt(int fd, int level, int name, void* value, uint32_t* size)

cdef extern from * nogil:
    """
    #include <sys/socket.h>

    /* sendmsg and recvmsg with segments only. In C, since Cython's constructor of a struct does not
       initialize the fields that it is not given, and the kernel uses all of them. */
    static inline ssize_t vr_send(int fd, const struct iovec *segments, size_t n, int flags) {
        struct msghdr message = {.msg_iov = (struct iovec *)segments, .msg_iovlen = n};
        return sendmsg(fd, &message, flags);
    }
    static inline ssize_t vr_receive(int fd, const struct iovec *segments, size_t n, int flags) {
        struct msghdr message = {.msg_iov = (struct iovec *)segments, .msg_iovlen = n};
        return recvmsg(fd, &message, flags);
    }
    """
    ssize_t vr_send(int fd, const iovec* segments, size_t n, int flags)
    ssize_t vr_receive(int fd, const iovec* segments, size_t n, int flags)

cdef extern from "<sys/ioctl.h>" nogil:
    enum:
        FIONREAD
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<fcntl.h>" nogil:
    enum:
        F_DUPFD_CLOEXEC, F_GETFL, F_GETPIPE_SZ, O_APPEND, O_NONBLOCK, SPLICE_F_NONBLOCK
    int fcntl(int fd, int command, ...)
    ssize_t splice(int from_, int64_t* at, int to, int64_t* there, size_t n, unsigned int flags)

cdef extern from "<sys/stat.h>" nogil:
    struct stat_t "stat":
        uint32_t st_mode
    enum:
        S_IFMT, S_IFSOCK, S_IFIFO, S_IFCHR, S_IFREG
    int fstat(int fd, stat_t* status)

cdef extern from "<poll.h>" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    enum:
        POLLIN, POLLOUT
    int poll(pollfd* fds, unsigned long n, int timeout_ms)
    int ppoll(pollfd* fds, unsigned long n, const timespec* timeout, const void* mask)

cdef extern from "<time.h>" nogil:
    struct timespec:
        int64_t tv_sec
        int64_t tv_nsec

cdef extern from "<sys/prctl.h>" nogil:
    enum:
        PR_SET_TIMERSLACK
    int prctl(int operation, unsigned long argument)

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        void* ptr
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    enum:
        EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP, EPOLLRDHUP
        EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL, EPOLL_CLOEXEC
    const uint32_t EPOLLET
    int epoll_create1(int flags)
    int epoll_ctl(int epoll_fd, int operation, int fd, epoll_event* event)
    int epoll_wait(int epoll_fd, epoll_event* events, int n, int timeout_ms)

cdef extern from "<sys/eventfd.h>" nogil:
    enum:
        EFD_CLOEXEC, EFD_NONBLOCK
    int eventfd(unsigned int count, int flags)

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    enum:
        SIG_SETMASK, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS
    int sigfillset(sigset_t* signals)
    int sigdelset(sigset_t* signals, int signal)
    int pthread_sigmask(int how, const sigset_t* signals, sigset_t* before)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_create(pthread_t* thread, void* attributes, void* (*main)(void*) noexcept nogil,
                       void* argument)
    int pthread_join(pthread_t thread, void** result)
    int pthread_setname_np(pthread_t thread, const char* name)
    int pthread_mutex_init(pthread_mutex_t* lock, void* attributes)
    int pthread_mutex_destroy(pthread_mutex_t* lock)
    int pthread_mutex_lock(pthread_mutex_t* lock)
    int pthread_mutex_unlock(pthread_mutex_t* lock)
    int pthread_cond_init(pthread_cond_t* condition, void* attributes)
    int pthread_cond_destroy(pthread_cond_t* condition)
    int pthread_cond_wait(pthread_cond_t* condition, pthread_mutex_t* lock)
    int pthread_cond_broadcast(pthread_cond_t* condition)

cdef extern from *:
    """
    #include <linux/kcmp.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* Return whether two descriptors are one open file, as far as the kernel tells. */
    static inline int vr_same_file(int a, int b) {
        struct stat one, two;
        long order = syscall(SYS_kcmp, getpid(), getpid(), KCMP_FILE, a, b);
        if (order >= 0)
            return order == 0;
        /* No such call, or not permitted. Eventfds and the like share one inode. */
        return !fstat(a, &one) && !fstat(b, &two) && one.st_dev == two.st_dev &&
               one.st_ino == two.st_ino && one.st_mode & S_IFMT && !S_ISCHR(one.st_mode);
    }
    """
    bint vr_same_file(int a, int b) nogil

cdef extern from *:
    """
    #include <pthread.h>
    #include <stdint.h>
    #include <time.h>

    static inline uint64_t vr_now(void) {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
    }
    /* Counters have one writer; other threads read whole values, some time later. */
    static inline void vr_count(uint64_t *counter, uint64_t n) {
        __atomic_store_n(counter, *counter + n, __ATOMIC_RELAXED);
    }
    static inline void vr_note(uint64_t *value, uint64_t n) {
        __atomic_store_n(value, n, __ATOMIC_RELAXED);
    }
    static inline uint64_t vr_counted(const uint64_t *counter) {
        return __atomic_load_n(counter, __ATOMIC_RELAXED);
    }
    static inline void vr_set_flag(int *flag, int value) {
        __atomic_store_n(flag, value, __ATOMIC_RELEASE);
    }
    static inline int vr_get_flag(const int *flag) {
        return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
    }
    """
    uint64_t vr_now() nogil                         # CLOCK_MONOTONIC, nanoseconds
    void vr_count(uint64_t* counter, uint64_t n) nogil
    void vr_note(uint64_t* value, uint64_t n) nogil
    uint64_t vr_counted(const uint64_t* counter) nogil
    void vr_set_flag(int* flag, int value) nogil
    int vr_get_flag(const int* flag) nogil
