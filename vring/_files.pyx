"""Checks that an access to a peer's memory file cannot block for ever."""

from __future__ import annotations

import fcntl
import os

from libc.errno cimport EBADF

from vring._linux cimport vr_same_file
from vring.errors import MemoryMapError

cdef extern from "<sys/vfs.h>" nogil:
    struct statfs_t "statfs":
        long f_type
        long f_bsize
    int fstatfs(int fd, statfs_t* status)

cdef extern from "<linux/magic.h>" nogil:
    enum:
        HUGETLBFS_MAGIC

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* Get major and minor number of a file's device from the kernel's cache (fstat would ask the
       file system). 0 if there is no statx (before Linux 4.11). */
    static int vr_device_of(int fd, uint32_t device[2]) {
    #ifdef SYS_statx
        enum { EMPTY_PATH = 0x1000, DONT_SYNC = 0x4000, MAJOR_AT = 136 };
        uint8_t status[256];
        if (syscall(SYS_statx, fd, "", EMPTY_PATH | DONT_SYNC, 0, status) == 0) {
            memcpy(device, status + MAJOR_AT, 2 * sizeof *device);
            return 1;
        }
    #endif
        return 0;
    }
    """
    bint vr_device_of(int fd, uint32_t* device) nogil

#: File systems on which an access waits only for this machine's memory and disks.
_LOCAL = frozenset(
    "bcachefs btrfs devpts devtmpfs ext2 ext3 ext4 f2fs hugetlbfs ramfs rootfs tmpfs xfs "
    "zfs".split()
)


cdef uint64_t mapping_page(int fd, what) except 0:
    cdef statfs_t status
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        if error.errno == EBADF:
            raise MemoryMapError(f"{what}: {error.strerror}") from error
        # Else a memfd, or on tmpfs or hugetlbfs: only they have seals.
        check_file_system(fd, what)
    if fstatfs(fd, &status) == 0 and <uint32_t>status.f_type == <uint32_t>HUGETLBFS_MAGIC:
        return status.f_bsize
    return os.sysconf("SC_PAGE_SIZE")


def check_file_system(int fd, str what):
    """Raise MemoryMapError unless the file's file system, if it has one, is known to be local.

    Nothing here asks the file system: fstat and fstatfs may block for ever as well, and neither a
    time limit nor a signal would end that.
    """
    try:
        if not os.readlink(f"/proc/self/fd/{fd}").startswith("/"):
            return  # a pipe, a socket, an eventfd: they have no bytes
        kind = _file_system(fd)
    except OSError as error:
        raise MemoryMapError(f"{what}: {error.strerror}") from error
    if kind not in _LOCAL:
        raise MemoryMapError(
            f"{what}: its file is on {kind or 'a file system that is not mounted here'}, where an "
            "access can wait for ever: memory is mapped from memfd, tmpfs, hugetlbfs and local "
            "disks (ext4, xfs, btrfs)"
        )


def _file_system(int fd):
    """Return the type of a file's file system, or "" if it is unknown."""
    cdef uint32_t device[2]
    with open(f"/proc/self/fdinfo/{fd}") as file:
        mount = next((line.split()[1] for line in file if line.startswith("mnt_id:")), "")
    number = f"{device[0]}:{device[1]}" if vr_device_of(fd, device) else ""
    elsewhere = ""
    with open("/proc/self/mountinfo", errors="surrogateescape") as file:
        for line in file:
            fields = line.split()
            kind = fields[fields.index("-", 6) + 1]
            if fields[0] == mount:
                # The root file system, whatever its type, holds the code that runs here.
                return "rootfs" if fields[4] == "/" else kind
            if fields[2] == number:
                elsewhere = kind
    # Mounted only for the peer (libvirt gives each machine a namespace): same result.
    return elsewhere


def same_file(int first, int second):
    """Return whether two descriptors are one open file, as far as that can be found out."""
    return vr_same_file(first, second)
