"""Bytes that wait for a host end, in memory that outlives the process."""

from __future__ import annotations

import os
import secrets

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint64_t

from vring._descriptor cimport begin_end, describe_data, discard_held, put, vr_fd
from vring._record cimport (
    VR_BOOKED, vr_is_open, vr_record, vr_recorded_bytes, vr_set_record, vr_store
)
from vring._segments cimport (
    backlog_add, backlog_drop, backlog_segments, strip_copy, vr_backlog, vr_strip
)
from vring._wire cimport iovec

from vring.errors import LocalMisuseError


cdef void store_settle(vr_backlog* backlog, vr_record* record) noexcept nogil:
    cdef vr_store* store = backlog.store
    cdef vr_record* own = &store.record
    cdef uint64_t taken = own.next_left if own.state == VR_BOOKED else vr_recorded_bytes(own)
    cdef uint64_t added = store.added, kept
    if added - taken > backlog.capacity:
        added = taken
    if record != NULL and record.kept_in == store.number:
        kept = record.kept
        if kept - added <= backlog.capacity - (added - taken):
            added = kept
    elif record != NULL:
        record.kept_in = 0
        record.kept = record.next_kept = added
        record.kept_in = store.number
    store.added = added
    if not vr_is_open(own):             # else the end knows more
        vr_set_record(own, 0, taken)
    backlog.head = taken % backlog.capacity
    backlog.length = added - taken


@cython.final
cdef class Backlog:
    """Bytes that wait for a host end, for a successor of this process too.

    Args:
        area: 512 bytes or more of memory that outlives this process, aligned to 8, zeroed when it
            is made; not used for anything else. All but 256 bytes are room.

    Raises LocalMisuseError: it cannot be such memory.
    """

    def __init__(self, area):
        cdef uint8_t[::1] view = area
        cdef size_t header = sizeof(vr_store)
        if view.shape[0] < <Py_ssize_t>(2 * header) or <size_t>&view[0] % 8:
            raise LocalMisuseError(f"a backlog has {2 * header} bytes or more, aligned to 8")
        self.area = view
        self.backlog.store = <vr_store*>&view[0]
        self.backlog.data = &view[0] + header
        self.backlog.capacity = view.shape[0] - header
        if self.backlog.store.number == 0:
            self.backlog.store.number = secrets.randbits(63) + 1
        store_settle(&self.backlog, NULL)

    cdef int check_free(self) except -1:
        if self.holder != NULL:
            raise LocalMisuseError("a pump's flow has the backlog until it is detached")
        return 0

    @property
    def data(self):
        """What waits, as bytes. Raises LocalMisuseError while a flow has the backlog."""
        cdef iovec[2] segments
        cdef vr_strip strip
        self.check_free()
        strip.at = segments
        strip.n = backlog_segments(&self.backlog, segments)
        cdef bytes copy = PyBytes_FromStringAndSize(NULL, self.backlog.length)
        strip_copy(&strip, <uint8_t*><char*>copy, self.backlog.length)
        return copy

    def replace(self, const uint8_t[::1] data not None):
        """Have these bytes wait instead of what there is; return whether there is room.

        If there is none, nothing waits. A process that is killed in here leaves what there was, or
        nothing, or these. Raises LocalMisuseError while a flow has the backlog.
        """
        self.check_free()
        if bytes(data) == self.data:
            return True
        backlog_drop(&self.backlog, self.backlog.length)
        if <size_t>data.shape[0] > self.backlog.capacity:
            return False
        if data.shape[0]:
            backlog_add(&self.backlog, &data[0], data.shape[0])
            self.backlog.store.added += data.shape[0]
        return True

    def write_to(self, fd, *, kept=False, relay=None):
        """Write as much as fits to a descriptor, never waiting; return the number of bytes.

        Args: as `write_fd`, `kept` and `relay` of Pump.guest_to_host.

        Raises:
            OSError: it takes none.
            LocalMisuseError: a flow has the backlog, or the descriptor is unsuitable.
        """
        cdef iovec[2] segments
        cdef vr_strip strip
        cdef vr_fd end
        cdef vr_record* record = &self.backlog.store.record
        cdef ssize_t done
        self.check_free()
        end.relayed = end.refused = False
        describe_data(&end, fd, "fd", kept, relay)
        with nogil:
            begin_end(&end, record, False)
            store_settle(&self.backlog, NULL)
            strip.at = segments
            strip.n = backlog_segments(&self.backlog, segments)
            done = put(&end, &strip, self.backlog.length, record)
            backlog_drop(&self.backlog, max(done, <ssize_t>0))
            discard_held(&end)
        if done < 0:
            raise OSError(-done, os.strerror(-done))
        return done
