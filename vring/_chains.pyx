"""Batches of descriptor chains, and single chains: tables of segments of guest memory."""

from __future__ import annotations

import numpy as np

cimport cython
from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc, PyMem_RawRealloc
from cpython.memoryview cimport PyMemoryView_FromObject
from cpython.number cimport PyNumber_Index
from cpython.object cimport PyObject
from libc.stddef cimport size_t

from vring._walk cimport vr_copy_in, vr_copy_out
from vring._wire cimport UINT32_MAX, vr_copy
from vring.errors import LocalMisuseError, MemoryLostError

cdef extern from "Python.h":
    Py_ssize_t PyTuple_GET_SIZE(object o)
    PyObject* PyTuple_GET_ITEM(PyObject* o, Py_ssize_t i)  # borrowed

#: Copies of at least so many bytes release the GIL.
cdef enum:
    NOGIL_BYTES = 32768

_CHAIN = np.dtype({
    "names": ["head", "first_segment", "n_readable", "n_writable",
              "readable_bytes", "writable_bytes"],
    "formats": ["u2", "u4", "u4", "u4", "u4", "u4"],
    "offsets": [0, 4, 8, 12, 16, 20],
    "itemsize": sizeof(vr_chain),
})
_ARRAY = np.ndarray
_UINT32 = np.dtype(np.uint32)
_SEGMENT = np.dtype({
    "names": ["address", "length"], "formats": ["u8", "u8"], "itemsize": sizeof(iovec)
})


@cython.final
cdef class _Column:
    """A read-only buffer over a table of a batch; it keeps the batch alive and out of reuse."""

    cdef Batch batch
    cdef void* start
    cdef Py_ssize_t length

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.start, self.length, 1, flags)


cdef object column(Batch batch, void* start, Py_ssize_t length, object dtype):
    cdef _Column rows = _Column.__new__(_Column)
    rows.batch = batch
    rows.start = start
    rows.length = length
    return np.frombuffer(rows, dtype) if length else np.empty(0, dtype)


@cython.final
cdef class Batch:
    """The chains that one ``pop_many`` took from a queue, as tables.

    ``len(batch)`` and every array cover the chains not completed yet. The arrays are read-only
    views of the batch's tables: get them again after a partial ``push_many``. A segment is a range
    of guest memory, given as an address in this process. The segments of chain i start at
    ``first_segment[i]``, the device-readable ones first. A buffer that crosses a region border
    has two segments; a buffer of length zero has none.

    The batch keeps the guest memory it was popped from alive until its chains are completed.
    """

    def __init__(self, *args, **kwargs):
        raise TypeError("batches come from pop_many")

    @staticmethod
    cdef Batch make(uint32_t max_chains, uint32_t max_segments):
        cdef Batch batch = Batch.__new__(Batch)
        batch.chains = <vr_chain*>PyMem_RawMalloc(max_chains * sizeof(vr_chain))
        batch.segments = <iovec*>PyMem_RawMalloc(max_segments * sizeof(iovec))
        batch.written = <uint32_t*>PyMem_RawMalloc(max_chains * sizeof(uint32_t))
        if batch.chains == NULL or batch.segments == NULL or batch.written == NULL:
            raise MemoryError
        batch.max_chains = max_chains
        batch.max_segments = max_segments
        return batch

    def __dealloc__(self):
        PyMem_RawFree(self.chains)
        PyMem_RawFree(self.segments)
        PyMem_RawFree(self.written)

    cdef int grow(self) except -1:
        """Double the segment table, for a single chain that crosses very many region borders."""
        cdef iovec* segments = <iovec*>PyMem_RawRealloc(
            self.segments, 2 * <size_t>self.max_segments * sizeof(iovec)
        )
        if segments == NULL:
            raise MemoryError
        self.segments = segments
        self.max_segments *= 2
        return 0

    cdef int take_written(self, object written, uint32_t n) except -1:
        """Store the result of plain_lengths in self.written[:n]; check it against the room."""
        cdef uint32_t i
        cdef const vr_chain* chains = self.chains + self.start
        cdef Py_buffer held
        cdef uint32_t same
        if type(written) is int:
            same = checked_length(written)
            for i in range(n):
                self.written[i] = same
        else:
            PyObject_GetBuffer(written, &held, PyBUF_SIMPLE)
            try:
                if held.len != <Py_ssize_t>(n * sizeof(uint32_t)):
                    raise LocalMisuseError(f"{held.len // 4} written lengths for {n} chains")
                vr_copy(self.written, held.buf, n * sizeof(uint32_t))
            finally:
                PyBuffer_Release(&held)
        for i in range(n):
            if self.written[i] > chains[i].writable_bytes:
                raise LocalMisuseError(
                    f"chain {i}: {self.written[i]} bytes written, "
                    f"but it has room for {chains[i].writable_bytes}"
                )
        return 0

    cdef int note_viewed(self, Chain chain) except -1:
        """Remember a chain that gave out memoryviews; the first, mostly the only one, apart."""
        if self.viewed_first is None:
            self.viewed_first = chain
        elif self.viewed_first is not chain:
            if self.viewed is None:
                self.viewed = []
            self.viewed.append(chain)
        return 0

    cdef void forget_views(self) noexcept:
        """Drop the references to views before the batch is used again.

        Fields that are None stay untouched: counting references to None costs as much as a chain.
        """
        if self.viewed_first is not None:
            self.viewed_first = None
        if self.viewed is not None:
            self.viewed = None

    cdef int withdraw_views(self, uint32_t end) except -1:
        """Release the memoryviews of the chains before row `end`."""
        cdef Chain chain
        if self.viewed_first is None:
            return 0
        if self.viewed_first.index < end:
            self.viewed_first.withdraw()
        if self.viewed is None:
            if self.viewed_first.index < end:
                self.viewed_first = None
            return 0
        for chain in self.viewed:
            if chain.index < end:
                chain.withdraw()
        self.viewed = [chain for chain in self.viewed if chain.index >= end]
        return 0

    cdef int finish(self, uint32_t n) except -1:
        """Drop the first n chains; with the last one, drop the reference to guest memory."""
        self.start += n
        if self.start == self.count:
            self.owner = None
            self.memory = None
        return 0

    def __len__(self):
        return self.count - self.start

    def __getitem__(self, Py_ssize_t i):
        if i < 0:
            i += self.count - self.start
        if not 0 <= i < self.count - self.start:
            raise IndexError("chain index out of range")
        return new_chain(self, self.start + <uint32_t>i)

    def __iter__(self):
        cdef _Chains chains = _Chains.__new__(_Chains)
        chains.batch = self
        chains.at = self.start
        return chains

    cdef object chain_column(self, str name):
        return column(
            self, self.chains + self.start, (self.count - self.start) * sizeof(vr_chain), _CHAIN
        )[name]

    cdef object segment_column(self, str name):
        cdef uint32_t end = 0
        cdef const vr_chain* last
        if self.count > self.start:
            last = &self.chains[self.count - 1]
            end = last.first_segment + last.n_readable + last.n_writable
        return column(self, self.segments, end * sizeof(iovec), _SEGMENT)[name]

    @property
    def heads(self):
        """Head descriptor index (split) or buffer id (packed) of each chain; uint16."""
        return self.chain_column("head")

    @property
    def first_segment(self):
        """Index in `addresses` and `lengths` of each chain's first segment; uint32."""
        return self.chain_column("first_segment")

    @property
    def n_readable(self):
        """Number of device-readable segments of each chain; uint32."""
        return self.chain_column("n_readable")

    @property
    def n_writable(self):
        """Number of device-writable segments of each chain, after its readable ones; uint32."""
        return self.chain_column("n_writable")

    @property
    def readable_bytes(self):
        """Bytes of the device-readable part of each chain; uint32."""
        return self.chain_column("readable_bytes")

    @property
    def writable_bytes(self):
        """Bytes of the device-writable part of each chain; uint32."""
        return self.chain_column("writable_bytes")

    @property
    def addresses(self):
        """Address in this process of each segment; uint64."""
        return self.segment_column("address")

    @property
    def lengths(self):
        """Length in bytes of each segment; uint64."""
        return self.segment_column("length")

    cdef uint64_t readable_total(self) noexcept nogil:
        cdef uint32_t i
        cdef uint64_t total = 0
        for i in range(self.start, self.count):
            total += self.chains[i].readable_bytes
        return total

    cdef void gather_to(self, uint8_t* to) noexcept nogil:
        vr_copy_out(self.chains + self.start, self.count - self.start, self.segments, to)

    cdef int check_epoch(self) except -1:
        """Refuse access to the chains after their queue was reset."""
        if self.owner is not None and self.current_epoch[0] != self.epoch:
            raise LocalMisuseError("the queue was reset after the chains were popped")
        return 0

    cdef int check_memory(self) except -1:
        """Raise MemoryLostError if guest memory just read may have been zeros instead."""
        if self.memory is not None and self.memory.is_lost():
            raise MemoryLostError(self.owner.name, 0, "guest memory is gone: its file was cut off")
        return 0

    def gather(self):
        """Return a copy of all device-readable bytes of all chains, joined.

        Raises:
            LocalMisuseError: the queue was reset since.
            MemoryLostError: a file behind guest memory was truncated; the copy may contain zeros.
        """
        self.check_epoch()
        cdef uint64_t total = self.readable_total()
        out = PyBytes_FromStringAndSize(NULL, total)
        cdef uint8_t* to = <uint8_t*>PyBytes_AS_STRING(out)
        if total >= NOGIL_BYTES:
            with nogil:
                self.gather_to(to)
        else:
            self.gather_to(to)
        self.check_memory()
        return out

    def gather_into(self, buffer):
        """Copy all device-readable bytes to the start of a writable buffer; return their number.

        Raises:
            LocalMisuseError: the buffer is smaller than the bytes of the batch, or the queue was
                reset since.
            MemoryLostError: a file behind guest memory was truncated; the copy may contain zeros.
        """
        cdef uint64_t total
        cdef Py_buffer held
        PyObject_GetBuffer(buffer, &held, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            self.check_epoch()
            total = self.readable_total()
            if <uint64_t>held.len < total:
                raise LocalMisuseError(f"the batch has {total} bytes, the buffer {held.len}")
            with nogil:
                self.gather_to(<uint8_t*>held.buf)
        finally:
            PyBuffer_Release(&held)
        self.check_memory()
        return total

    def scatter(self, data):
        """Copy data into the device-writable parts, chain by chain, until data or room ends.

        Returns:
            The number of chains that got data, and the bytes written into each (uint32 array), for
            ``queue.push_many(batch, written, used)``. No chain is completed here.

        Raises:
            LocalMisuseError: the queue was reset since.
        """
        cdef Py_buffer held
        cdef uint32_t i, k
        cdef uint64_t done = 0
        cdef const vr_chain* chain
        cdef uint32_t[::1] rows
        # First: the buffer's own code may complete the chains.
        PyObject_GetBuffer(data, &held, PyBUF_SIMPLE)
        try:
            self.check_epoch()
            i = self.start
            with nogil:
                while i < self.count and done < <uint64_t>held.len:
                    chain = &self.chains[i]
                    self.written[i - self.start] = vr_copy_in(
                        self.segments + chain.first_segment + chain.n_readable, chain.n_writable,
                        0, <uint8_t*>held.buf + done, held.len - done
                    )
                    done += self.written[i - self.start]
                    i += 1
            i -= self.start
            out = np.empty(i, np.uint32)
            rows = out
            for k in range(i):
                rows[k] = self.written[k]
        finally:
            PyBuffer_Release(&held)
        return i, out


cdef uint32_t checked_length(object value) except? 0:
    value = PyNumber_Index(value)
    if not 0 <= value <= UINT32_MAX:
        raise LocalMisuseError(f"{value} bytes written: not a used length (0 to 2**32 - 1)")
    return value


cdef object plain_lengths(object written, uint32_t most):
    cdef Py_ssize_t i, n
    cdef uint32_t[::1] rows
    if isinstance(written, int):
        return PyNumber_Index(written)
    if type(written) is _ARRAY and written.dtype == _UINT32 and (
        written.ndim == 1 and written.flags.c_contiguous
    ):
        return written
    n = len(written)
    if n > most:
        raise LocalMisuseError(f"{n} written lengths for at most {most} chains")
    out = np.empty(n, np.uint32)
    rows = out
    for i in range(n):
        rows[i] = checked_length(written[i])
    return out


cdef inline int release_views(tuple views) except -1:
    """Release the memoryviews that others refer to; the rest are freed with the tuple.

    The caller's variable must be the only reference to the tuple. A view to which the tuple has the
    only reference is in use by nobody else.
    """
    cdef Py_ssize_t i
    for i in range(PyTuple_GET_SIZE(views)):
        if not held_once(PyTuple_GET_ITEM(<PyObject*>views, i)) or not held_once(<PyObject*>views):
            try:
                views[i].release()
            except BufferError:
                pass
    return 0


cdef Chain new_chain(Batch batch, uint32_t index):
    cdef Chain chain = Chain.__new__(Chain)
    chain.batch = batch
    chain.index = index
    return chain


@cython.final
cdef class _Chains:
    """An iterator over a batch; it reuses a Chain object that nothing else refers to."""

    cdef Batch batch
    cdef uint32_t at
    cdef Chain last
    cdef Chain older            # the loop's variable still refers to the last when it asks again

    def __iter__(self):
        return self

    def __next__(self):
        cdef Chain chain = self.older
        if self.batch is None or self.at >= self.batch.count:
            raise StopIteration
        self.older = self.last          # the reference to the older one is the variable's now
        if chain is None or not held_once(<PyObject*>chain):
            chain = new_chain(self.batch, self.at)
        else:
            chain.index = self.at
            chain.written = 0
        self.last = chain
        self.at += 1
        return chain


@cython.final
cdef class Chain:
    """One descriptor chain in flight: device-readable buffers, then device-writable ones.

    Valid until it is completed (``queue.push``); afterwards every use raises LocalMisuseError, and
    the memoryviews it gave out are released. Until then it keeps the memory behind them alive.

    Attributes:
        written: bytes stored by `write` so far; read-only.
    """

    def __init__(self, *args, **kwargs):
        raise TypeError("chains come from pop")

    cdef vr_chain* row(self) except NULL:
        if (
            self.batch is None or self.batch.owner is None or self.index < self.batch.start
            or self.batch.current_epoch[0] != self.batch.epoch
        ):
            self.refuse()
        return &self.batch.chains[self.index]

    cdef int refuse(self) except -1:
        if self.batch is None:
            raise LocalMisuseError("chains come from pop")
        self.batch.check_epoch()
        raise LocalMisuseError("the chain has been completed or given back")

    def __getbuffer__(self, Py_buffer* view, int flags):
        if self.exported.iov_base == NULL:
            raise BufferError("take the buffers of a chain from its readable or writable")
        PyBuffer_FillInfo(
            view, self, self.exported.iov_base, self.exported.iov_len,
            not self.export_writable, flags
        )
        self.exports += 1

    def __releasebuffer__(self, Py_buffer* view):
        self.exports -= 1

    cdef tuple views(self, uint32_t first, uint32_t n, bint writable):
        cdef uint32_t i
        self.batch.note_viewed(self)
        self.export_writable = writable
        try:
            if n == 1:
                self.exported = self.batch.segments[first]
                return (PyMemoryView_FromObject(self),)
            out = []
            for i in range(first, first + n):
                self.exported = self.batch.segments[i]
                out.append(PyMemoryView_FromObject(self))
            return tuple(out)
        finally:
            self.exported.iov_base = NULL

    cdef void forget_views(self) noexcept:
        """Do as Batch.forget_views, for a chain that has its own batch."""
        if self._readable is not None:
            self._readable = None
        if self._writable is not None:
            self._writable = None
        self.batch.forget_views()

    cdef int withdraw(self) except -1:
        """Release the memoryviews; refuse while something else still points into them."""
        cdef tuple views
        if self._readable is not None:
            views = self._readable
            self._readable = None
            release_views(views)
            views = None
        if self._writable is not None:
            views = self._writable
            self._writable = None
            release_views(views)
            views = None
        if self.exports:
            raise LocalMisuseError(
                "a slice or array made from a memoryview of the chain is still in use: "
                "release it before the chain is completed"
            )
        return 0

    @property
    def head(self):
        """Head descriptor index (split) or buffer id (packed)."""
        return self.row().head

    @property
    def readable_bytes(self):
        """Bytes of the device-readable part."""
        return self.row().readable_bytes

    @property
    def writable_bytes(self):
        """Bytes of the device-writable part."""
        return self.row().writable_bytes

    @property
    def readable(self):
        """Read-only memoryviews of the device-readable buffers, released at completion."""
        cdef vr_chain* row = self.row()
        if self._readable is None:
            self._readable = self.views(row.first_segment, row.n_readable, False)
            self.row()              # collecting garbage meanwhile may have completed the chain
        return self._readable

    @property
    def writable(self):
        """Memoryviews of the device-writable buffers, released at completion.

        Bytes written through them count only if their number is passed to ``push``.
        """
        cdef vr_chain* row = self.row()
        if self._writable is None:
            self._writable = self.views(
                row.first_segment + row.n_readable, row.n_writable, True
            )
            self.row()              # as above
        return self._writable

    def read(self):
        """Return a copy of all device-readable bytes.

        Raises:
            LocalMisuseError: the chain is completed or given back, or its queue was reset.
            MemoryLostError: guest memory was cut off, and what was copied may be zeros instead.
        """
        cdef vr_chain* row = self.row()
        out = PyBytes_FromStringAndSize(NULL, row.readable_bytes)
        vr_copy_out(row, 1, self.batch.segments, <uint8_t*>PyBytes_AS_STRING(out))
        self.batch.check_memory()
        return out

    def write(self, data):
        """Append data to what earlier calls wrote into the device-writable part.

        Returns:
            The number of bytes that fitted; ``chain.written`` is the sum of all calls.

        Raises:
            LocalMisuseError: the chain is completed or given back, or its queue was reset.
        """
        cdef vr_chain* row
        cdef Py_buffer held
        cdef uint64_t done
        # First: the buffer's own code may complete the chain.
        PyObject_GetBuffer(data, &held, PyBUF_SIMPLE)
        try:
            row = self.row()
            done = vr_copy_in(
                self.batch.segments + row.first_segment + row.n_readable, row.n_writable,
                self.written, <uint8_t*>held.buf, held.len
            )
            self.written += <uint32_t>done
        finally:
            PyBuffer_Release(&held)
        return done
