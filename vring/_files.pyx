"""Which files a peer's memory may be mapped from: none that can make us wait for ever."""

from __future__ import annotations

import fcntl
import os

from libc.errno cimport EBADF

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

    /* Major and minor number of the device that a file is on, from what the kernel knows: fstat
       asks the file system. 0 if there is no statx (before Linux 4.11). */
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

#: Whose accesses wait for this machine's memory and disks, and for nobody else.
_LOCAL = frozenset(
    "bcachefs btrfs devtmpfs ext2 ext3 ext4 f2fs hugetlbfs ramfs rootfs tmpfs xfs zfs".split()
)


cdef uint64_t mapping_page(int fd, what) except 0:
    cdef statfs_t status
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        if error.errno == EBADF:
            raise MemoryMapError(f"{what}: {error.strerror}") from error
        _check_file_system(fd, what)  # else a memfd, or on tmpfs or hugetlbfs: only they have seals
    if fstatfs(fd, &status) == 0 and <uint32_t>status.f_type == <uint32_t>HUGETLBFS_MAGIC:
        return status.f_bsize
    return os.sysconf("SC_PAGE_SIZE")


def _check_file_system(int fd, what):
    """Raises MemoryMapError on what is not known to be local, by name.

    Nothing here asks the file system, which is why fstat and fstatfs are not used: they may wait
    for ever as well, and neither a time limit nor a signal would help.
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
    """The type of the file system that a file is on; "" if it cannot be told."""
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
                # Our own root, whatever it is, holds the very code that runs here.
                return "rootfs" if fields[4] == "/" else kind
            if fields[2] == number:
                elsewhere = kind
    # Mounted for the peer alone (libvirt gives each machine a namespace); here too, it is the same.
    return elsewhere
