# The front door for other extensions: `cimport vring` or `from vring cimport VirtQueue, vr_chain`.

from vring._chains cimport Batch, Chain
from vring._core cimport VirtQueue
from vring._dirty cimport DirtyLog
from vring._driver cimport Driver
from vring._memory cimport GuestMemory, Region, vr_find, vr_map, vr_region
from vring._packed cimport PackedQueue
from vring._packed_driver cimport PackedDriver
from vring._split cimport SplitQueue
from vring._split_driver cimport SplitDriver
from vring._walk cimport vr_chain
from vring._wire cimport iovec
