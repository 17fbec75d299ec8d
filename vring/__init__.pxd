# The front door for other extensions: `cimport vring` or `from vring cimport VirtQueue, vr_chain`.

from vring._chains cimport Batch, Chain, vr_chain
from vring._core cimport SplitQueue, VirtQueue
from vring._driver cimport Driver, PackedDriver, SplitDriver
from vring._memory cimport GuestMemory, Region, vr_find, vr_map, vr_region
from vring._packed cimport PackedQueue
from vring._wire cimport iovec
