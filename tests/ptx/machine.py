"""Threads, barriers and launches of the PTX machine.

A batch of blocks runs at once. Threads that are at the same instruction go together: the group with
the lowest program counter takes the next step, so that threads which went apart meet again. A gate
(a barrier, or an instruction of a whole warp) opens when nothing else can run.
"""

import ctypes
from dataclasses import dataclass, field

import numpy as np

from . import memory
from .memory import Fault, GlobalMemory, ParamMemory, SharedMemory
from .parse import Kernel, kernels_of
from .translate import Translator, local

WARP = 32
LANES = 8192  # threads of a batch, about
SHARED_LIMIT = 48 * 1024  # of a block, without cudaFuncSetAttribute
TURNS = 3  # in random order, warps are dealt into so many lots, which run one after the other


@dataclass
class Code:
    """A kernel, its blocks translated when they first run."""

    kernel: Kernel
    functions: dict = field(default_factory=dict)

    def __post_init__(self):
        self.translator = Translator(self.kernel)

        self.live = {}

    def live_in(self, index: int) -> set[str]:
        """Names of the registers, and of their masks, that block `index` may need."""
        if index not in self.live:
            names = [local(r) for r in sorted(self.kernel.blocks[index].live_in)]
            self.live[index] = dict.fromkeys([*names, *(n + "_bad" for n in names)])
        return self.live[index]

    @property
    def share_run(self) -> float:
        sizes = [len(block.code) for block in self.kernel.blocks]
        return sum(sizes[i] for i in self.functions) / sum(sizes)

    def function(self, index: int):
        if index not in self.functions:
            self.functions[index] = self.translator.function(self.kernel.blocks[index])
        return self.functions[index]


class Step:
    """The threads that run a block of code together, ascending, and what they see."""

    def __init__(self, batch, lanes):
        self.batch, self.lanes = batch, lanes
        self.param, self.shared, self.glob = batch.param, batch.shared, batch.machine.memory
        self.nctaid, self.ntid = batch.nctaid, batch.ntid
        self.block_places = lanes // batch.threads
        self.launch_fence = batch.launch_fence

    def __getattr__(self, name):
        """What only some steps need, made when it is asked for."""
        batch, lanes = self.batch, self.lanes
        made = {
            "tid": lambda: (lanes % batch.threads).astype(np.uint32),
            "ctaid": lambda: batch.blocks[self.block_places].astype(np.uint32),
            "stamps": lambda: batch.machine.clock << memory.WHEN | batch.thread_ids[lanes],
            "block_fence": lambda: batch.block_sync[self.block_places] << memory.WHEN,
            "warp_fence": lambda: batch.warp_sync[lanes // WARP] << memory.WHEN,
        }.get(name)
        if made is None:
            raise AttributeError(name)
        setattr(self, name, made())
        return getattr(self, name)

    def fence(self, block_only):
        return self.block_fence[:, None] if block_only else self.launch_fence

    def same_block(self, stamps):
        warps = stamps >> memory.LANE_BITS & (1 << memory.WARP_BITS) - 1
        return warps // self.batch.warps == self.batch.blocks[self.block_places][:, None]

    def of(self, mask):
        return self if mask.all() else Step(self.batch, self.lanes[mask])

    # --- called by translated code ---

    def maybe(self, registers, name, zero):
        if name in registers:
            return registers[name], registers.get(name + "_bad", np.False_)
        return zero, np.True_

    def require(self, bad, register):
        if np.any(bad):
            raise Fault(f"{register} is used and was never written", bad)

    def each(self, value):
        """One value a thread."""
        return value if value.ndim else np.full(len(self.lanes), value)

    def copy_async(self, to, source, sizes):
        data = self.glob.copy_source(source, sizes, self)
        at = self.shared.place(to, 16, self)
        region = self.shared.region
        # A write from now until it is waited for: nothing else may touch the place.
        elements = region._elements(at, 16)
        region.shadow.note_write(elements, self, True, memory.UNDER_WAY)
        self.batch.copies.append((self.lanes, self.batch.committed[self.lanes], at, data))

    def commit(self):
        self.batch.committed[self.lanes] += 1

    def wait(self, groups_left):
        self.batch.land(self, self.batch.committed[self.lanes] - groups_left)


class Batch:
    """Some of the blocks of a launch."""

    def __init__(self, machine, code, blocks, launch):
        self.machine, self.code, self.blocks = machine, code, blocks
        self.threads, self.param, self.launch_fence = launch.threads, launch.param, launch.fence
        self.nctaid, self.ntid = np.uint32(launch.blocks), np.uint32(launch.threads)
        self.warps = self.threads // WARP
        count = len(blocks) * self.threads
        warp_ids = (blocks[:, None] * self.warps + np.arange(self.warps)).reshape(-1)
        lanes = np.arange(count)
        self.thread_ids = warp_ids[lanes // WARP] << memory.LANE_BITS | lanes % WARP
        self.shared = SharedMemory(len(blocks), launch.shared)
        start = launch.fence >> memory.WHEN
        self.block_sync = np.full(len(blocks), start)
        self.warp_sync = np.full(len(blocks) * self.warps, start)
        self.committed = np.zeros(count, dtype=np.int64)
        self.copies = []
        self.turns = machine.turns(len(blocks) * self.warps)
        self.ready, self.gates = {}, {}
        self.deal(0, lanes, {})

    def run(self):
        while self.ready or self.gates:
            if self.ready:
                key = min(self.ready)
                self.step(key[1], *self.merge(key[1], self.ready.pop(key)))
            elif not self.open_gates():
                self.deadlock()

    def deal(self, index, lanes, registers):
        """Puts a group where it goes on."""
        if not len(lanes):
            return
        gate = self.code.kernel.blocks[index].gate
        if gate:
            self.gates.setdefault(index, []).append((lanes, registers))
        else:
            self.ready_at(index, lanes, registers)

    def ready_at(self, index, lanes, registers):
        turns = self.turns[lanes // WARP]
        for turn in np.unique(turns) if self.machine.shuffled else (0,):
            mine = turns == turn
            if mine.all():
                group = lanes, registers
            else:
                group = lanes[mine], self.part(index, registers, mine)
            self.ready.setdefault((turn, index), []).append(group)

    def part(self, index, registers, chosen):
        """What of the registers block `index` may need, for a part of the threads."""
        live = self.code.live_in(index)
        return {
            name: value[chosen] if value.ndim else value
            for name, value in registers.items()
            if name in live
        }

    def merge(self, index, groups):
        if len(groups) == 1:
            return groups[0]
        lanes = np.concatenate([g[0] for g in groups])
        order = np.argsort(lanes)
        ordered = not (np.diff(lanes) < 0).any()
        sizes = [len(g[0]) for g in groups]
        merged = {}
        for name in self.code.live_in(index):
            values = [g[1].get(name) for g in groups]
            known = [v for v in values if v is not None]
            if not known:
                continue
            if len(known) < len(values) and not name.endswith("_bad"):
                bad = [g[1].get(name + "_bad", np.bool_(name not in g[1])) for g in groups]
                merged[name + "_bad"] = self.joined(bad, sizes, ordered, order)
            elif name.endswith("_bad") and name in merged:
                continue
            values = [known[0].dtype.type(0) if v is None else v for v in values]
            merged[name] = self.joined(values, sizes, ordered, order)
        return lanes if ordered else lanes[order], merged

    @staticmethod
    def joined(values, sizes, ordered, order):
        first = values[0]
        if first.ndim == 0:
            bits = first.tobytes()
            if all(v.ndim == 0 and v.tobytes() == bits for v in values):
                return first
        # np.broadcast_to takes several times as long as np.full
        parts = [v if v.ndim else np.full(n, v) for v, n in zip(values, sizes, strict=True)]
        both = np.concatenate(parts)
        return both if ordered else both[order]

    def step(self, index, lanes, registers):
        block = self.code.kernel.blocks[index]
        function, origin = self.code.function(index)
        step = Step(self, lanes)
        try:
            jumps = function(step, registers)
        except (Fault, ZeroDivisionError) as fault:
            self.explain(fault, lanes, origin)
        if block.jump is None:
            if block.falls_through:
                self.deal(index + 1, lanes, registers)
            else:
                self.leave(lanes)
        elif jumps is None or (jumps.ndim == 0 and jumps) or (jumps.ndim and jumps.all()):
            self.deal(block.jump, lanes, registers)
        elif not jumps.any():
            self.deal(index + 1, lanes, registers)
        else:
            for target, chosen in ((index + 1, ~jumps), (block.jump, jumps)):
                chosen = np.flatnonzero(chosen)
                self.deal(target, lanes[chosen], self.part(target, registers, chosen))

    def explain(self, fault, lanes, origin):
        """Raises the fault again, with where it is."""
        trace = fault.__traceback__
        while trace and not trace.tb_frame.f_code.co_filename.startswith("<ptx"):
            trace = trace.tb_next
        threads = getattr(fault, "threads", None)
        first = 0
        if threads is not None and threads.ndim and len(threads) == len(lanes):
            first = int(np.argmax(threads))
        lane = lanes[first]
        raise Fault(
            f"{fault} (block {self.blocks[lane // self.threads]}, thread {lane % self.threads}; "
            f"{self.code.kernel.name}, {origin[trace.tb_lineno] if trace else '?'})"
        ) from fault

    def open_gates(self) -> bool:
        opened = False
        for index in sorted(self.gates):
            lanes, registers = self.merge(index, self.gates.pop(index))
            block = self.code.kernel.blocks[index]
            size = self.threads if block.gate == "block" else WARP
            groups = lanes // size
            complete = np.bincount(groups)[groups] == size
            if complete.any():
                opened = True
                self.pass_gate(block, lanes[complete], self.part_of(index, registers, complete))
            if not complete.all():
                rest = self.part_of(index, registers, ~complete)
                self.gates[index] = [(lanes[~complete], rest)]
        return opened

    def part_of(self, index, registers, chosen):
        return registers if chosen.all() else self.part(index, registers, chosen)

    def pass_gate(self, block, lanes, registers):
        if block.synchronises:
            self.machine.clock += 1
            self.warp_sync[lanes // WARP] = self.machine.clock
            if block.gate == "block":
                self.block_sync[lanes // self.threads] = self.machine.clock
        if self.machine.shuffled and block.gate == "block":
            warps = np.unique(lanes // WARP)
            self.turns[warps] = self.machine.turns(len(warps))
        self.ready_at(block.index, lanes, registers)

    def deadlock(self):
        places = {i: np.concatenate([g[0] for g in groups]) for i, groups in self.gates.items()}
        index, lanes = min(places.items())
        where = self.code.kernel.blocks[index].code[0]
        raise Fault(
            f"threads wait at a barrier that others do not reach "
            f"({len(lanes)} of them at {where}; {self.code.kernel.name})"
        )

    def land(self, step, below):
        """Ends the copies of the step's threads whose group is below a number, one a thread."""
        region, left = self.shared.region, []
        limits = np.full(len(self.committed), -1)
        limits[step.lanes] = below
        for lanes, groups, at, data in self.copies:
            now = groups < limits[lanes]
            if now.any():
                region.views[16][at[now] // 16] = data[now]
                when = self.machine.clock << memory.WHEN | self.thread_ids[lanes[now]]
                region.shadow.written[region._elements(at[now], 16)] = when[:, None]
            if not now.all():
                left.append((lanes[~now], groups[~now], at[~now], data[~now]))
        self.copies = left

    def leave(self, lanes):
        for copying, *_ in self.copies:
            if np.isin(copying, lanes).any():
                raise Fault(
                    f"a thread ends with asynchronous copies under way ({self.code.kernel.name})"
                )


@dataclass
class Launch:
    blocks: int
    threads: int
    shared: int
    param: ParamMemory
    fence: int


class Machine:
    """Kernels by name, the memory they may use, and how they run."""

    def __init__(self):
        self.kernels: dict[str, Kernel] = {}
        self.codes: dict[str, Code] = {}
        self.memory = GlobalMemory()
        self.clock = 1
        self.launches = 0
        self.order()

    def load(self, text: str) -> None:
        self.kernels |= kernels_of(text)

    def fill(self, address: int, value: int, size: int) -> None:
        """cudaMemset"""
        buffer = self.memory.find(address, address + size)
        if self.memory.buffers:
            if buffer is None or buffer.shadow is None:
                raise Fault(f"{size} bytes are set outside of every output of the call")
            buffer.host_writes(address, size)
        ctypes.memset(address, value, size)

    def order(self, seed: int | None = None) -> None:
        """All warps side by side or, with a seed, in lots at random that change at each barrier."""
        self.shuffled = seed is not None
        self.random = np.random.default_rng(seed)

    def turns(self, warps: int) -> np.ndarray:
        """Of warps until the next barrier."""
        if self.shuffled:
            return self.random.integers(TURNS, size=warps)
        return np.zeros(warps, dtype=np.int64)

    def instructions_run(self) -> dict[str, float]:
        """Of each kernel that ran, the share of its instructions that some thread reached."""
        return {name: code.share_run for name, code in self.codes.items()}

    def launch(self, name: str, blocks: int, threads: int, shared: int, params: bytes) -> None:
        kernel = self.kernels[name]
        if name not in self.codes:
            self.codes[name] = Code(kernel)
        if not 0 < blocks < 2**31 or not 0 < threads <= kernel.max_threads or threads % WARP:
            raise Fault(f"{name}: a launch of {blocks} blocks of {threads} threads")
        if shared > SHARED_LIMIT or len(params) != kernel.param_bytes:
            raise Fault(f"{name}: a launch with {shared} bytes shared, {len(params)} of parameters")
        self.launches += 1
        self.clock += 1
        launch = Launch(blocks, threads, shared, ParamMemory(params), self.clock << memory.WHEN)
        order = np.arange(blocks)
        if self.shuffled:
            self.random.shuffle(order)
        many = max(1, LANES // threads)
        with np.errstate(all="ignore"):
            for first in range(0, blocks, many):
                Batch(self, self.codes[name], order[first : first + many], launch).run()
