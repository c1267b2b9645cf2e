"""Global, shared and parameter memory, and what is wrong with an access to it.

Every access is checked against the bounds of its buffer and its own width. Memory that a launch may
write is shadowed as well: each element has the stamps of its last write and of its last reads, so
that a read of what nothing has written is a fault, and so are two accesses, one of them a write, by
two threads with no barrier between them, whatever order they happen to run in here.
"""

import ctypes
from bisect import bisect_right

import numpy as np

# A stamp: when (the machine's clock, which barriers advance), which warp, which lane.
LANE_BITS, WARP_BITS = 6, 28
WHEN = LANE_BITS + WARP_BITS
THREAD = (1 << WHEN) - 1
SEVERAL = 32  # as a lane: more than one of the warp
NEVER, BY_HOST = 0, 1
UNDER_WAY = np.iinfo(np.int64).max  # an asynchronous copy will write here
SHARED_BASE = 1024  # of a block's shared memory; not 0, so that an offset alone is no address
# Bytes of an access -> a type that moves them bit for bit.
RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


class Fault(RuntimeError):
    """What a GPU would trap, or hide. `threads`: which of the step's, a mask."""

    def __init__(self, what, threads=None):
        super().__init__(what)
        self.threads = threads


def _any(bad, what):
    if bad.any():
        raise Fault(what, bad if bad.ndim < 2 else bad.any(axis=1))


class Shadow:
    """Stamps of the elements of a buffer."""

    def __init__(self, elements: int, written: bool):
        self.written = np.full(elements, BY_HOST if written else NEVER)
        self.read = np.zeros(elements, dtype=np.int64)
        # The last read by a warp other than that of `read`, at about the same time.
        self.read_elsewhere = np.zeros(elements, dtype=np.int64)

    def note_read(self, at, step, block_only):
        """at (threads, elements of the access)"""
        mine = step.stamps[:, None]
        written = self.written[at]
        if written.min() == NEVER:
            _any(written == NEVER, "a read of memory that nothing has written")
        self._check(written, mine, step, block_only, "a read of what another thread writes")
        before = self.read[at]
        mine = np.broadcast_to(mine, at.shape)
        if not (before < step.fence(block_only)).all():
            recent, same_warp = self._recent(before, mine, step, block_only)
            self.read_elsewhere[at[recent & ~same_warp]] = before[recent & ~same_warp]
            mine = np.where(recent & same_warp & (before != mine), mine | SEVERAL, mine)
        self.read[at] = mine
        lost = self.read[at] != mine  # to another thread of this very step
        if lost.any():
            other, own = self.read[at[lost]], mine[lost]
            near = (other ^ own) & THREAD < 1 << LANE_BITS
            self.read[at[lost][near]] |= SEVERAL
            self.read_elsewhere[at[lost][~near]] = own[~near]

    def note_write(self, at, step, block_only, stamp=None):
        mine = step.stamps[:, None]
        twice = "two threads write one element with no barrier between"
        self._check(self.written[at], mine, step, block_only, twice)
        for reads in (self.read, self.read_elsewhere):
            what = "a write of what another thread reads with no barrier between"
            self._check(reads[at], mine, step, block_only, what)
        self.written[at] = mine
        _any(self.written[at] != mine, twice)
        if stamp is not None:
            self.written[at] = stamp

    def _recent(self, before, mine, step, block_only):
        """Of other accesses: not ordered before this one by a barrier; by the same warp."""
        apart = (before ^ mine) & THREAD
        same_warp = apart < 1 << LANE_BITS
        fence = step.block_fence[:, None]
        if not block_only:
            fence = np.where(step.same_block(before), fence, step.launch_fence)
        fence = np.where(same_warp, step.warp_fence[:, None], fence)
        return (before >= fence) & (apart != 0), same_warp

    def _check(self, before, mine, step, block_only, what):
        if (before < step.fence(block_only)).all():
            return
        bad = self._recent(before, mine, step, block_only)[0]
        if bad.any():
            if (before[bad] == UNDER_WAY).any():
                what = "an access to shared memory that an asynchronous copy is under way to"
            elif "barrier" not in what:
                what += " with no barrier between"
            _any(bad, what)


class Region:
    """Bytes with a shadow or without."""

    def __init__(self, window: np.ndarray, element: int, shadow: Shadow | None, block_only: bool):
        self.views = {width: window.view(raw) for width, raw in RAW.items()}
        self.element, self.shadow, self.block_only = element, shadow, block_only

    def load(self, at, width, step):
        """at: bytes from the start of the window, a multiple of width."""
        if self.shadow:
            at = step.each(at)
            self.shadow.note_read(self._elements(at, width), step, self.block_only)
        return self.views[width][at // width]

    def store(self, at, width, values, step, stamp=None):
        self.shadow.note_write(self._elements(at, width), step, self.block_only, stamp)
        self.views[width][at // width] = values

    def _elements(self, at, width):
        if width < self.element:
            raise Fault(f"an access of {width} bytes to elements of {self.element}")
        return (at // self.element)[:, None] + np.arange(width // self.element)


class Buffer(Region):
    """Memory of a tensor. Without a shadow it can only be read."""

    def __init__(self, address, size, element=1, writable=False, written=True):
        self.address, self.end = address, address + size
        self.start = address // 16 * 16  # of the window: wide accesses are multiples of 16 bytes
        length = -(-(self.end - self.start) // 16) * 16
        memory = np.frombuffer((ctypes.c_uint8 * length).from_address(self.start), dtype=np.uint8)
        shadow = Shadow(length // element, written) if writable else None
        super().__init__(memory, element, shadow, False)

    @property
    def unwritten(self) -> int:
        """Elements that nothing has written yet."""
        first = (self.address - self.start) // self.element
        count = (self.end - self.address) // self.element
        return int((self.shadow.written[first : first + count] == NEVER).sum())

    def host_writes(self, address, size):
        first = (address - self.start) // self.element
        self.shadow.written[first : first + size // self.element] = BY_HOST


class GlobalMemory:
    """The buffers that a launch may use. With none named, every address is taken as it is."""

    def __init__(self):
        self.buffers = []

    def name(self, *args, **kwargs) -> Buffer:
        buffer = Buffer(*args, **kwargs)
        self.buffers.append(buffer)
        self.buffers.sort(key=lambda b: b.address)
        return buffer

    def find(self, first, end) -> Buffer | None:
        i = bisect_right(self.buffers, first, key=lambda b: b.address) - 1
        return self.buffers[i] if i >= 0 and end <= self.buffers[i].end else None

    def load(self, address, width, step):
        _aligned(address, width)
        first, end = int(address.min()), int(address.max()) + width
        buffer = self.find(first, end) if self.buffers else Buffer(first, end - first)
        if buffer:
            return buffer.load((address - np.uint64(buffer.start)).astype(np.int64), width, step)
        address = step.each(address)
        values = np.empty(len(address), dtype=RAW[width])
        for buffer, mine in self._parts(address, width, "read"):
            at = (address[mine] - np.uint64(buffer.start)).astype(np.int64)
            values[mine] = buffer.load(at, width, step.of(mine))
        return values

    def store(self, address, width, values, step):
        _aligned(address, width)
        address = step.each(address)
        values = step.each(values)
        if not self.buffers:
            first = int(address.min())
            buffer = Buffer(first, int(address.max()) + width - first)
            at = (address - np.uint64(buffer.start)).astype(np.int64)
            buffer.views[width][at // width] = values
            return
        for buffer, mine in self._parts(address, width, "write"):
            if buffer.shadow is None:
                raise Fault("a write to a tensor that the call only reads", mine)
            at = (address[mine] - np.uint64(buffer.start)).astype(np.int64)
            buffer.store(at, width, values[mine], step.of(mine))

    def _parts(self, address, width, what):
        """Buffers, and which of the addresses lie in each."""
        left = np.ones(len(address), dtype=bool)
        for buffer in self.buffers:
            low, high = np.uint64(buffer.address), np.uint64(buffer.end)
            mine = left & (address >= low) & (address + np.uint64(width) <= high)
            if mine.any():
                left &= ~mine
                yield buffer, mine
        _any(left, f"a {what} of {width} bytes outside of every tensor of the call")

    def copy_source(self, address, sizes, step):
        """16 bytes each for asynchronous copies: `sizes` of them from memory, the rest zeros."""
        _aligned(address, 16)
        address, sizes = (step.each(a) for a in (address, sizes))
        rows = np.zeros((len(address), 16), dtype=np.uint8)
        some = sizes > 0
        _any(sizes > 16, "an asynchronous copy of more than 16 bytes")
        if not self.buffers and some.any():
            first = int(address[some].min())
            buffers = [Buffer(first, int(address[some].max()) + 16 - first)]
        else:
            buffers = self.buffers
        left = some.copy()
        for buffer in buffers:
            ends = address + sizes.astype(np.uint64)
            mine = left & (address >= np.uint64(buffer.address)) & (ends <= np.uint64(buffer.end))
            if mine.any():
                if buffer.shadow:
                    raise Fault("an asynchronous copy from a tensor that the call writes", mine)
                at = ((address[mine] - np.uint64(buffer.start)) >> np.uint64(4)).astype(np.int64)
                rows[mine] = buffer.views[16][at].view(np.uint8).reshape(-1, 16)
                left &= ~mine
        _any(left, "an asynchronous copy from outside of every tensor of the call")
        rows[np.arange(16) >= sizes[:, None]] = 0
        return rows.view(np.complex128).reshape(-1)


class SharedMemory:
    """Of the blocks of a batch, one after the other."""

    def __init__(self, blocks: int, size: int):
        self.size, self.stride = size, -(-size // 16) * 16
        window = np.zeros(max(blocks * self.stride, 16), dtype=np.uint8)
        self.region = Region(window, 4, Shadow(len(window) // 4, False), True)

    def place(self, address, width, step):
        """Where in the region it is."""
        _aligned(address, width)
        address = step.each(address).astype(np.int64)
        outside = (address < SHARED_BASE) | (address + width > SHARED_BASE + self.size)
        _any(outside, f"an access of {width} bytes outside of the block's shared memory")
        return step.block_places * self.stride + address - SHARED_BASE

    def load(self, address, width, step):
        return self.region.load(self.place(address, width, step), width, step)

    def store(self, address, width, values, step):
        self.region.store(self.place(address, width, step), width, values, step)


class ParamMemory:
    """The struct that a kernel is launched with."""

    BASE = 1 << 20

    def __init__(self, values: bytes):
        self.size = len(values)
        padded = np.frombuffer(values + bytes(-len(values) % 16), dtype=np.uint8)
        self.views = {width: padded.view(raw) for width, raw in RAW.items()}

    def load(self, address, width, step):
        _aligned(address, width)
        at = address - np.uint64(self.BASE)
        _any(np.asarray(at > np.uint64(self.size - width)), "a read outside of the parameters")
        return self.views[width][at // np.uint64(width)]


def _aligned(address, width):
    if width > 1:
        bad = (address & address.dtype.type(width - 1)) != 0
        _any(np.asarray(bad), f"an access of {width} bytes is not aligned to them")
