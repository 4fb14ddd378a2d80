"""Price command words: cycles, bytes and energy of a region, from the words and the target alone.

The words are those of `simulator.isa`, whether generated without running or logged by the C simulator.

Time model. Commands issue in order and at once; register commands take no time. Each copy or fill waits for a
free channel of its DMA, each operation for its engine, and `barrier` waits for everything. A copy takes its DMA's
setup, the slower latency of the two memories, and then its bytes at the lowest of the three bandwidths, where a
contiguous run shorter than a memory's burst counts as a burst. Copies of weights that the target keeps encoded move the
encoded bytes. An operation takes its engine's issue time and then the longer of its compute time (`simulator.engines`)
and the time its operands need at their memories' bandwidths. Commands that move bytes through one port of a memory at
the same time share its bandwidth (`simulator.contention`); the target says who has a port of their own.

Every command's time is rounded up to whole cycles of the accelerator's clock.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from qcompiler.integer.sparsity import KEPT
from qcompiler.integer.weight_groups import Groups
from qcompiler.quant import interpolation
from qcompiler.simulator import contention, engines, isa
from qcompiler.simulator.contention import Ports, Run, Task, Use
from qcompiler.simulator.weight_code import EncodedSpan, ratio_at
from qcompiler.simulator.workload import SCALE_RECORD_BYTES, Dims, Feed, OpClass, Port, Shape
from qcompiler.target import Gpu, Host, Match, Npu, OpFacts, Target

COMPUTE = "compute"
ISSUE = "issue"
NOTHING = "nothing"
PROLOGUE = -1
"""Layer of the commands before the first `layer` command."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes moved on one memory's bus, whole bursts, repeated reads included."""

    memory: str
    read: int
    written: int


@dataclass(frozen=True, slots=True)
class Contention:
    """By what a command was slowed, and how much longer it took."""

    memory: str
    cycles: int
    units: tuple[str, ...]
    """Who else used the memory's port; a channel of a DMA as "dma 1"."""


@dataclass(frozen=True, slots=True)
class CommandCost:
    """One command that takes time: a copy, a fill, an operation, or a barrier that had to wait."""

    index: int
    """Of the command in the region, register commands counted."""
    name: str
    layer: int
    unit: str
    """Engine or DMA that runs it, "barrier" for barriers."""
    channel: int
    """Of the DMA; 0 for engines."""
    start: int
    end: int
    """Cycles from the region's start."""
    macs: int
    elements: int
    """Outputs of an operation, 0 for copies."""
    traffic: tuple[Traffic, ...]
    limit: str
    """What its duration came from: "compute", "issue", or the name of a memory or DMA."""
    waited_for: str
    """What it waited for once issued, "" if nothing; for a barrier, the last unit to finish."""
    contention: Contention | None
    """None if nothing slowed it."""


@dataclass(frozen=True, slots=True)
class Energy:
    """Picojoules."""

    macs: float
    memory: float
    idle: float

    @property
    def total(self) -> float:
        return self.macs + self.memory + self.idle


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What one node of a region costs."""

    index: int
    """As in its `layer` command; PROLOGUE for commands before the first."""
    cycles: int
    """By how much the layer's commands moved the region's end: work hidden behind earlier layers counts nothing."""
    macs: int
    elements: int
    utilisation: float
    """Time the MACs would take at the engines' peak rates, over the cycles (or over the time the engines were busy,
    if earlier layers hid part of it); 0 for a layer without MACs."""
    traffic: tuple[Traffic, ...]
    """One entry a memory of the target, in its order."""
    bound_by: str
    """What kept its busiest unit busy: "compute", "issue", the name of a memory or DMA, or "nothing" (a view)."""
    energy: Energy


@dataclass(frozen=True, slots=True)
class RegionCost:
    """What a command stream costs."""

    commands: tuple[CommandCost, ...]
    layers: tuple[LayerCost, ...]
    """In order of first appearance; cycles, MACs, bytes and energies add up to the region's."""
    cycles: int
    seconds: float
    macs: int
    elements: int
    utilisation: float
    traffic: tuple[Traffic, ...]
    energy: Energy
    peak_scratchpad: int
    """Most bytes reserved at once."""
    scratchpad_top: int
    """End of the highest reservation."""
    clock: float


@dataclass(frozen=True, slots=True)
class HostCost:
    """Time and energy of something the host does."""

    seconds: float
    energy: float
    """Picojoules."""


def price(
    words: Sequence[int] | npt.NDArray[np.int32],
    target: Target,
    bases: Mapping[int, str] | None = None,
    encoded: Mapping[int, Sequence[EncodedSpan]] | None = None,
) -> RegionCost:
    """Price a region's command words.

    Args:
        words: int32 words, as `isa.decode` takes them.
        target: a target with an accelerator.
        bases: memory name by address base. Base 0 is the scratchpad; a base not named is the external memory.
        encoded: by address base, where weights lie that the target keeps encoded.
    """
    assert target.npu is not None, f"{target.name} has no accelerator"
    pricer = _Pricer(target, target.npu, bases or {}, encoded or {})
    pricer.run(words.tolist() if isinstance(words, np.ndarray) else list(words))
    return pricer.result()


class Operations:
    """Prices single operations, nothing else being under way. Arguments as of `price`."""

    def __init__(
        self,
        target: Target,
        bases: Mapping[int, str] | None = None,
        encoded: Mapping[int, Sequence[EncodedSpan]] | None = None,
    ) -> None:
        assert target.npu is not None, f"{target.name} has no accelerator"
        self._pricer = _Pricer(target, target.npu, bases or {}, encoded or {})

    def cycles(self, words: Sequence[int]) -> int:
        """What the operation takes that ends a command stream."""
        self._pricer.read(words)
        task = self._pricer.issued.pop().job.task
        return task.setup + task.moving


def host_cost(host: Host, *, precision: str, macs: int, elements: int, transferred: int) -> HostCost:
    """One operator on the CPU, all threads: its MACs at their precision's rate, then its outputs.

    Args:
        precision: as for `host_rate`.
        macs: multiply-accumulates.
        elements: outputs, or inputs if there are more.
        transferred: bytes read and written.
    """
    cycles = macs / host_rate(host, precision) + elements / host.element_rate
    energy = macs * host.mac_energy + transferred * host.byte_energy
    return HostCost(cycles / (host.clock * host.threads), energy)


def host_rate(host: Host, precision: str) -> float:
    """MACs per cycle and thread for a pair such as "int8*int8", or "float32".

    Weights of fewer bits without a rate of their own count as int8, to which the CPU's code unpacks them; any other
    pair without one counts as float32.
    """
    rates = host.rates()
    return rates.get(precision) or rates.get(_FEW_BITS.sub("*int8", precision)) or rates["float32"]


_FEW_BITS = re.compile(r"\*int[124]$")


def crossing_cost(unit: Npu | Gpu, transferred: int) -> HostCost:
    """Handing a region over and back: one synchronization, and its inputs and outputs through external memory."""
    moving = transferred / unit.crossing.bandwidth.per_cycle(unit.clock)
    seconds = (unit.crossing.sync.cycles(unit.clock) + moving) / unit.clock
    energy = unit.memory.energy if isinstance(unit, Gpu) else unit.external.energy
    return HostCost(seconds, transferred * (energy.read + energy.write))


# --- decoding ----------------------------------------------------------------------------------------------------


Words = tuple[int, ...]
"""One command: its code, then its arguments."""


def _picker(opcode: isa.Opcode, first: str, second: str, *more: str) -> Callable[[Words], Words]:
    """Reads named arguments out of a command's words."""
    return itemgetter(*(opcode.arguments.index(name) + 1 for name in (first, second, *more)))


def _single(opcode: isa.Opcode, name: str) -> Callable[[Words], int]:
    return itemgetter(opcode.arguments.index(name) + 1)


_WORDS = {opcode.code: len(opcode.arguments) + 1 for opcode in isa.OPCODES}
_NAMES = {opcode.code: opcode.name for opcode in isa.OPCODES}

_DMA_ORIGIN = _picker(isa.DMA, "src_base", "src_offset")
_DMA_SHAPE = _picker(isa.DMA, *(name for name in isa.DMA.arguments if not name.endswith("_offset")))
_DMA_SOURCE = _picker(isa.DMA, "src_base", "src_plane_stride", "src_row_stride")
_DMA_DESTINATION = _picker(isa.DMA, "dst_base", "dst_plane_stride", "dst_row_stride")
_DMA_SIZE = _picker(isa.DMA, "planes", "rows", "row_bytes")
_FILL_DESTINATION = _picker(isa.FILL, "base", "plane_stride", "row_stride")
_FILL_SIZE = _picker(isa.FILL, "planes", "rows", "row_bytes")
_IFM = _picker(isa.IFM, "base", "height", "width", "depth", "dtype")
_IFM_STRIDES = _picker(isa.IFM, "stride_y", "stride_x", "stride_c")
_OFM = _picker(isa.OFM, "base", "height", "width", "depth", "dtype")
_KERNEL = _picker(isa.KERNEL, "height", "width", "stride_y", "stride_x", "dilation_y", "dilation_x")
_WEIGHTS = _picker(isa.WEIGHTS, "base", "dtype", "group")
_GROUPS = _picker(isa.CONV, "ifm_group_depth", "ofm_group_depth")

_OPERATORS: Mapping[int, tuple[str, ...]] = {
    isa.CONV.code: ("Conv", "Gemm", "MatMul"),
    isa.CONV_TRANSPOSE.code: ("ConvTranspose", "Conv"),
    isa.MAX_POOL.code: ("MaxPool", "ReduceMax"),
    isa.AVERAGE_POOL.code: ("AveragePool", "ReduceMean"),
    isa.ADD.code: ("Add", "Sub"),
    isa.MUL.code: ("Mul",),
    isa.REQUANTIZE.code: ("Requantize", "Clip"),
    isa.LOOKUP.code: ("Lookup",),
    isa.SOFTMAX.code: ("Softmax",),
    isa.RESIZE_NEAREST.code: ("Resize",),
    isa.RESIZE_LINEAR.code: ("Resize",),
}
"""Operators a command may stand for; the first the target has a rule for says which engine runs it."""

_CONVOLUTIONS = (isa.CONV.code, isa.CONV_TRANSPOSE.code)
_WINDOWED = (*_CONVOLUTIONS, isa.MAX_POOL.code, isa.AVERAGE_POOL.code)
_TABLE_BASES: Mapping[int, Callable[[Words], int]] = {
    opcode.code: _single(opcode, "base") for opcode in (isa.LOOKUP, isa.SOFTMAX, isa.RESIZE_NEAREST, isa.RESIZE_LINEAR)
}
_SCALED = (*_CONVOLUTIONS, isa.AVERAGE_POOL.code, isa.MUL.code, isa.REQUANTIZE.code)
_SCALES_BASE = _single(isa.SCALES, "base")


@dataclass(frozen=True, slots=True)
class _Job:
    """A command apart from when it runs: the same for every command with the same arguments."""

    task: Task
    macs: int
    elements: int
    traffic: tuple[Traffic, ...]
    limit: str
    mac_energy: float
    mac_cycles: float
    """The MACs at the engine's peak rate."""


@dataclass(frozen=True, slots=True)
class _Issued:
    """A command that runs before the next barrier."""

    index: int
    code: int
    layer: int
    job: _Job


class _Layer:
    """Running sums of one layer."""

    def __init__(self) -> None:
        self.cycles = self.macs = self.elements = 0
        self.mac_energy = self.mac_cycles = 0.0
        self.read: defaultdict[str, int] = defaultdict(int)
        self.written: defaultdict[str, int] = defaultdict(int)
        self.busy: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
        """Cycles by unit and limit."""
        self.multipliers: set[str] = set()
        """Engines that ran MACs."""

    def add(self, job: _Job, limit: str, cycles: int) -> None:
        unit = job.task.unit
        self.macs += job.macs
        self.elements += job.elements
        self.mac_energy += job.mac_energy
        self.mac_cycles += job.mac_cycles
        self.busy[unit][limit] += cycles
        if job.macs:
            self.multipliers.add(unit)
        for traffic in job.traffic:
            self.read[traffic.memory] += traffic.read
            self.written[traffic.memory] += traffic.written

    def utilisation(self) -> float:
        multiplying = sum(sum(self.busy[unit].values()) for unit in self.multipliers)
        return self.mac_cycles / max(self.cycles, multiplying) if self.mac_cycles else 0.0

    def bound_by(self) -> str:
        if not self.busy:
            return NOTHING
        limits = max(self.busy.values(), key=lambda by_limit: sum(by_limit.values()))
        return max(limits, key=lambda limit: limits[limit])


class _Pricer:
    """Walks the words once. Register contents are kept as raw words; `_Job`s are computed once per distinct key."""

    def __init__(
        self, target: Target, npu: Npu, bases: Mapping[int, str], encoded: Mapping[int, Sequence[EncodedSpan]]
    ) -> None:
        self.target, self.npu, self.bases, self.encoded = target, npu, bases, encoded
        self.scratchpad, self.external = npu.memory_name("scratchpad"), npu.memory_name("external")
        self.bandwidth = {name: memory.bandwidth.per_cycle(npu.clock) for name, memory in npu.memories.items()}
        self.in_place = {
            name: (memory.engine_bandwidth or memory.bandwidth).per_cycle(npu.clock)
            for name, memory in npu.memories.items()
        }
        self.read_latency = {name: memory.latency.cycles(npu.clock) for name, memory in npu.memories.items()}
        self.write_latency = {
            name: (memory.write_latency or memory.latency).cycles(npu.clock) for name, memory in npu.memories.items()
        }
        self.ports = {name: Port.of(memory, npu.clock) for name, memory in npu.memories.items()}
        self.shared = Ports.of(npu)
        self.jobs: dict[tuple[float, ...], _Job] = {}
        self.issued: list[_Issued] = []
        self.commands: list[CommandCost] = []
        self.layers: dict[int, _Layer] = {}
        self.issue = self.frontier = 0
        """When the next command may start; when everything so far is done."""
        self.settled = 0
        """Up to when the layers' cycles are given out."""
        self.last = ""
        """The unit that finishes at the frontier."""
        self.channels = dict.fromkeys(npu.engines, 1) | {name: dma.channels for name, dma in npu.dma.items()}
        self.reserved = self.peak = self.top = 0

    def run(self, words: Sequence[int]) -> None:
        self.read(words)
        self._settle()

    def read(self, words: Sequence[int]) -> None:
        """All commands; those after the last barrier stay issued."""
        registers: dict[int, Words] = {}
        empty: Words = ()
        ifm: list[Words] = [empty, empty]
        layer, position, index = PROLOGUE, 0, 0
        self.layers.setdefault(PROLOGUE, _Layer())
        while position < len(words):
            code = words[position]
            end = position + _WORDS[code]
            command = tuple(words[position:end])
            position = end
            if code == isa.IFM.code:
                ifm[command[1]] = command
            elif code in _OPERATORS:
                key = (
                    code,
                    *_IFM(ifm[0]),
                    *_OFM(registers[isa.OFM.code]),
                    *(_KERNEL(registers[isa.KERNEL.code]) if code in _WINDOWED else empty),
                    *(_WEIGHTS(registers[isa.WEIGHTS.code]) + _GROUPS(command) if code in _CONVOLUTIONS else empty),
                    *(_IFM(ifm[1]) + _IFM_STRIDES(ifm[1]) if code in (isa.ADD.code, isa.MUL.code) else empty),
                    _SCALES_BASE(registers[isa.SCALES.code]) if code in _SCALED else -1,
                    _TABLE_BASES[code](command) if code in _TABLE_BASES else -1,
                    self._weight_ratio(code, registers),
                )
                job = self.jobs.get(key)
                if job is None:
                    job = self.jobs[key] = self._operation(code, command, registers, ifm)
                self.issued.append(_Issued(index, code, layer, job))
            elif code in (isa.DMA.code, isa.FILL.code):
                job = self._copy(command) if code == isa.DMA.code else self._fill(command)
                self.issued.append(_Issued(index, code, layer, job))
            elif code == isa.BARRIER.code:
                self._settle()
                if self.frontier > self.issue:
                    times = (self.issue, self.frontier)
                    self.commands.append(
                        CommandCost(index, "barrier", layer, "barrier", 0, *times, 0, 0, (), "", self.last, None)
                    )
                    self.issue = self.frontier
            elif code == isa.LAYER.code:
                layer = command[1]
                self.layers.setdefault(layer, _Layer())
            elif code == isa.ALLOC.code:
                self.reserved += command[2]
                self.peak = max(self.peak, self.reserved)
                self.top = max(self.top, command[1] + command[2])
            elif code == isa.FREE.code:
                self.reserved -= command[2]
            else:
                registers[code] = command
            index += 1

    # --- time ---

    def _settle(self) -> None:
        """Run what was issued since the last barrier, and give the time it took to the layers at work.

        Earlier layers get theirs first, as they would take it.
        """
        if not self.issued:
            return
        done: dict[int, int] = {}
        tasks = [issued.job.task for issued in self.issued]
        for issued, run in zip(
            self.issued, contention.run(tasks, self.issue, self.channels, self.shared.bandwidth), strict=True
        ):
            self._record(issued, run)
            done[issued.layer] = max(run.end, done.get(issued.layer, 0))
        for layer in sorted(done):
            gained = max(0, done[layer] - self.settled)
            self.layers[layer].cycles += gained
            self.settled += gained
        self.issued.clear()

    def _record(self, issued: _Issued, run: Run) -> None:
        job, slowed, limit = issued.job, None, issued.job.limit
        if run.contention is not None:
            limit = self.shared.memory[run.contention.port]
            slowed = Contention(limit, run.contention.cycles, run.contention.units)
        unit = job.task.unit
        self.commands.append(
            CommandCost(
                issued.index, _NAMES[issued.code], issued.layer, unit, run.channel, run.start, run.end, job.macs,
                job.elements, job.traffic, limit, unit if run.start > self.issue else "", slowed,
            )
        )  # fmt: skip
        self.layers[issued.layer].add(job, limit, run.end - run.start)
        if run.end > self.frontier:
            self.frontier, self.last = run.end, unit

    # --- copies ---

    def _memory(self, base: int) -> str:
        return self.scratchpad if base == isa.SCRATCHPAD else self.bases.get(base, self.external)

    def _copy(self, command: Words) -> _Job:
        # Runs shrink with encoded weights; nobody reads them in part.
        ratio = self._ratio(*_DMA_ORIGIN(command))
        key = (isa.DMA.code, ratio, *_DMA_SHAPE(command))
        job = self.jobs.get(key)
        if job is None:
            source_base, *source_strides = _DMA_SOURCE(command)
            destination_base, *destination_strides = _DMA_DESTINATION(command)
            planes, rows, row_bytes = _DMA_SIZE(command)
            read = _run_length(planes, rows, row_bytes, *source_strides)
            written = _run_length(planes, rows, row_bytes, *destination_strides)
            size, read, written = (ceil(ratio * count) for count in (planes * rows * row_bytes, read, written))
            source, destination = self._memory(source_base), self._memory(destination_base)
            job = self.jobs[key] = self._transfer(source, destination, size, read, written)
        return job

    def _fill(self, command: Words) -> _Job:
        base, *strides = _FILL_DESTINATION(command)
        planes, rows, row_bytes = _FILL_SIZE(command)
        written = _run_length(planes, rows, row_bytes, *strides)
        key = (isa.FILL.code, base, planes * rows * row_bytes, written)
        job = self.jobs.get(key)
        if job is None:
            job = self.jobs[key] = self._transfer(None, self._memory(base), planes * rows * row_bytes, 0, written)
        return job

    def _transfer(self, source: str | None, destination: str, size: int, read_run: int, write_run: int) -> _Job:
        """A copy of `size` bytes in contiguous runs, or a fill if there is no source."""
        name = self._dma(source, destination)
        dma = self.npu.dma[name]
        ends = [(destination, write_run)] if source is None else [(source, read_run), (destination, write_run)]
        moved = {memory: 0 for memory, _ in ends}
        read = written = 0
        for memory, run in ends:
            burst = max(1, self.npu.memories[memory].burst)
            on_bus = size // run * (ceil(run / burst) * burst) if run < burst else size
            moved[memory] += on_bus
            if memory == source and not read:
                read = on_bus
            else:
                written = on_bus
        times = {name: size / dma.bandwidth.per_cycle(self.npu.clock)}
        times |= {memory: moved[memory] / self.bandwidth[memory] for memory in moved}
        slowest = max(times, key=lambda unit: times[unit])
        latency = self.write_latency[destination]
        if source is not None:
            latency = max(latency, self.read_latency[source])
        setup = dma.setup.cycles(self.npu.clock) + latency
        traffic = [Traffic(destination, 0, written)] if source is None else [
            *([Traffic(source, read, 0), Traffic(destination, 0, written)] if source != destination
              else [Traffic(source, read, written)]),
        ]  # fmt: skip
        whole_setup, moving = ceil(setup), ceil(times[slowest])
        uses = _uses(self.shared.copies, moved, moving)
        return _Job(
            task=Task(name, whole_setup, moving, uses),
            macs=0,
            elements=0,
            traffic=tuple(traffic),
            limit=slowest if moving >= whole_setup else name,
            mac_energy=0,
            mac_cycles=0,
        )

    def _dma(self, source: str | None, destination: str) -> str:
        """The DMA for a copy.

        Fills, copies within one memory, and copies without a path of their own (constants that go straight to external
        memory) use the first that writes the destination.
        """
        found = None if source is None else self.npu.path_between(source, destination)
        if found is None:
            found = next((name for name, dma in self.npu.dma.items() if dma.writes(destination)), None)
        assert found is not None, f"{self.target.name} has no DMA from {source} to {destination}"
        return found

    # --- operations ---

    def _weight_ratio(self, code: int, registers: Mapping[int, Words]) -> float:
        """Encoded bytes per byte of the weights an operation reads, if they lie where weights are encoded."""
        if code not in _CONVOLUTIONS:
            return 1.0
        _, base, offset, *_ = registers[isa.WEIGHTS.code]
        return self._ratio(base, offset)

    def _ratio(self, base: int, offset: int) -> float:
        return ratio_at(self.encoded[base], offset) if base in self.encoded else 1.0

    def _operation(self, code: int, command: Words, registers: Mapping[int, Words], ifm: Sequence[Words]) -> _Job:
        ifm_base, *ifm_shape, ifm_dtype = _IFM(ifm[0])
        ofm_base, *ofm_shape, ofm_dtype = _OFM(registers[isa.OFM.code])
        kernel = _KERNEL(registers[isa.KERNEL.code]) if code in _WINDOWED else (1, 1, 1, 1, 1, 1)
        precision, weight_base, weight_bits, groups, sparse = isa.DTYPES[ifm_dtype], -1, 0.0, 1, False
        if code in _CONVOLUTIONS:
            weight_base, weight_dtype, sharing = _WEIGHTS(registers[isa.WEIGHTS.code])
            sparse = weight_dtype == isa.SPARSE_WEIGHTS
            weights = "int8" if sparse or sharing else isa.DTYPES[weight_dtype]
            precision, weight_bits = f"{precision}*{weights}", float(isa.BITS[weight_dtype])
            ifm_group_depth, ofm_group_depth = _GROUPS(command)
            if sharing:
                held = Groups(sharing, isa.BITS[weight_dtype])
                weight_bits += held.count(ifm_group_depth) * held.factor_bits / ifm_group_depth
            groups = ifm_shape[2] // ifm_group_depth
            depthwise = groups > 1 and ifm_group_depth == ofm_group_depth == 1
            op = "depthwise" if depthwise else "conv"
        else:
            depthwise, op = False, _CLASSES[code]
        transposed = code == isa.CONV_TRANSPOSE.code
        result = isa.DTYPES[ofm_dtype] if isa.BITS[ofm_dtype] != isa.BITS[ifm_dtype] else ""
        unit = self._engine(code, precision, result, kernel, groups, depthwise=depthwise)
        engine = self.npu.engines[unit]
        if engine.sparsity is not None and code == isa.CONV.code and groups == 1 and ifm_shape[2] <= KEPT:
            sparse = precision in engine.sparsity.precisions  # filled up with channels of zeros
        speedup = engine.sparsity.speedup if sparse and engine.sparsity is not None else 1.0
        shape = Shape(
            op,
            (ofm_shape[0], ofm_shape[1], ofm_shape[2]),
            (ifm_shape[0], ifm_shape[1], ifm_shape[2]),
            (kernel[0], kernel[1]),
            (1, 1) if transposed else (kernel[2], kernel[3]),
            (kernel[4], kernel[5]),
            groups,
            isa.BITS[ifm_dtype],
            isa.BITS[ofm_dtype],
            weight_bits,
            kernel[2] * kernel[3] if transposed else 1,
            _distinct(ifm[1]) if code in (isa.ADD.code, isa.MUL.code) else None,
            speedup,
        )
        scales_base = _SCALES_BASE(registers[isa.SCALES.code]) if code in _SCALED else -1
        scales_memory = self._memory(scales_base) if code in _SCALED else self.scratchpad
        feed = Feed(*(self.ports[name] for name in (self._memory(ifm_base), self._memory(ofm_base), scales_memory)))
        work = engines.work(shape, engine, precision, feed)

        read: defaultdict[str, float] = defaultdict(float)
        read[self._memory(ifm_base)] += work.ifm_bytes
        if code in (isa.ADD.code, isa.MUL.code):
            second = _distinct(ifm[1])
            read[self._memory(_IFM(ifm[1])[0])] += second[0] * second[1] * second[2] * isa.BITS[_IFM(ifm[1])[4]] / 8
        if weight_base >= 0:
            read[self._memory(weight_base)] += work.weight_bytes * self._weight_ratio(code, registers)
        if scales_base >= 0:
            read[scales_memory] += SCALE_RECORD_BYTES * (ofm_shape[2] if code in _CONVOLUTIONS else 1)
        if code in _TABLE_BASES:
            read[self._memory(_TABLE_BASES[code](command))] += _table_bytes(code, ofm_shape, isa.BITS[ifm_dtype])
        written = {self._memory(ofm_base): work.ofm_bytes}

        traffic = tuple(
            Traffic(name, ceil(read.get(name, 0)), ceil(written.get(name, 0)))
            for name in self.npu.memories
            if name in read or name in written
        )
        times = {memory.memory: (memory.read + memory.written) / self.in_place[memory.memory] for memory in traffic}
        times[COMPUTE] = work.cycles
        limit = max(reversed(times), key=lambda unit: times[unit])
        issue = engine.issue.cycles(self.npu.clock)
        priced = engine.precisions.get(precision)
        duration, setup = ceil(issue + times[limit]), int(issue)
        moved = {memory.memory: memory.read + memory.written for memory in traffic}
        return _Job(
            task=Task(unit, setup, duration - setup, _uses(self.shared.engines, moved, duration - setup)),
            macs=shape.macs,
            elements=shape.ofm_elements,
            traffic=traffic,
            limit=ISSUE if issue > times[limit] else limit,
            mac_energy=shape.macs * priced.energy / speedup if priced else 0,
            mac_cycles=shape.macs / (priced.rate * speedup) if priced else 0,
        )

    def _engine(self, code: int, precision: str, result: str, kernel: Words, groups: int, *, depthwise: bool) -> str:
        """The engine of the first rule that takes the operator, judged by what a command still tells."""
        facts: dict[str, int | bool | str] = {}
        if code in _WINDOWED:
            names = ("kernel_h", "kernel_w", "stride_h", "stride_w", "dilation_h", "dilation_w")
            facts |= dict(zip(names, kernel, strict=True)) | {"kernel_area": kernel[0] * kernel[1]}
        if code in _CONVOLUTIONS:
            facts |= {"group": groups, "depthwise": depthwise}
        for op in _OPERATORS[code]:
            match = self.target.match(OpFacts(op, precision, facts, result=result))
            if isinstance(match, Match):
                return match.engine
        # Lowering may use a command for something else (a requantize as a copy, say).
        named = (rule.engine for op in _OPERATORS[code] for rule in self.npu.rules if op in rule.ops)
        engine = next(named, None)
        assert engine is not None, f"{self.target.name} has no rule for {' or '.join(_OPERATORS[code])}"
        return engine

    # --- sums ---

    def result(self) -> RegionCost:
        layers = tuple(
            self._layer_cost(index, layer) for index, layer in self.layers.items() if layer.busy or index != PROLOGUE
        )
        traffic = tuple(
            Traffic(
                name,
                sum(layer.traffic[position].read for layer in layers),
                sum(layer.traffic[position].written for layer in layers),
            )
            for position, name in enumerate(self.npu.memories)
        )
        ideal = sum(layer.mac_cycles for layer in self.layers.values())
        return RegionCost(
            commands=tuple(self.commands),
            layers=layers,
            cycles=self.frontier,
            seconds=self.frontier / self.npu.clock,
            macs=sum(layer.macs for layer in layers),
            elements=sum(layer.elements for layer in layers),
            utilisation=ideal / self.frontier if self.frontier else 0.0,
            traffic=traffic,
            energy=Energy(
                sum(layer.energy.macs for layer in layers),
                sum(layer.energy.memory for layer in layers),
                sum(layer.energy.idle for layer in layers),
            ),
            peak_scratchpad=self.peak,
            scratchpad_top=self.top,
            clock=self.npu.clock,
        )

    def _layer_cost(self, index: int, layer: _Layer) -> LayerCost:
        traffic = tuple(Traffic(name, layer.read[name], layer.written[name]) for name in self.npu.memories)
        memory_energy = sum(
            moved.read * memory.energy.read + moved.written * memory.energy.write
            for moved, memory in zip(traffic, self.npu.memories.values(), strict=True)
        )
        idle = self.npu.idle_power * layer.cycles / self.npu.clock * 1e12
        return LayerCost(
            index=index,
            cycles=layer.cycles,
            macs=layer.macs,
            elements=layer.elements,
            utilisation=layer.utilisation(),
            traffic=traffic,
            bound_by=layer.bound_by(),
            energy=Energy(layer.mac_energy, memory_energy, idle),
        )


_CLASSES: Mapping[int, OpClass] = {
    isa.MAX_POOL.code: "max_pool",
    isa.AVERAGE_POOL.code: "average_pool",
    isa.ADD.code: "add",
    isa.MUL.code: "mul",
    isa.REQUANTIZE.code: "requantize",
    isa.LOOKUP.code: "lookup",
    isa.SOFTMAX.code: "softmax",
    isa.RESIZE_NEAREST.code: "resize_nearest",
    isa.RESIZE_LINEAR.code: "resize_linear",
}


def _uses(ports: Mapping[str, str], moved: Mapping[str, float], cycles: int) -> tuple[Use, ...]:
    """What a command that moves so many bytes by memory in so many cycles asks of ports it has not to itself."""
    return tuple(Use(ports[memory], size / cycles) for memory, size in moved.items() if size and memory in ports)


def _run_length(planes: int, rows: int, row_bytes: int, plane_stride: int, row_stride: int) -> int:
    """Bytes that lie one after another in memory: a row, or more where strides leave no gap."""
    if rows > 1 and row_stride != row_bytes:
        return row_bytes
    if planes > 1 and plane_stride != rows * row_bytes:
        return rows * row_bytes
    return planes * rows * row_bytes


def _distinct(ifm: Words) -> Dims:
    """Height, width and depth of a second operand; along a stride of 0 there is one element for all."""
    _, height, width, depth, _ = _IFM(ifm)
    stride_y, stride_x, stride_c = _IFM_STRIDES(ifm)
    return height if stride_y else 1, width if stride_x else 1, depth if stride_c else 1


def _table_bytes(code: int, ofm_shape: Sequence[int], bits: int) -> int:
    """Lookup: 256 bytes, or 513 int16; softmax: 256 int32, or two tables and a factor; resizing: one index a row and
    column, or two with their weights."""
    if code == isa.LOOKUP.code:
        return 2 * interpolation.ENTRIES if bits == 16 else 256
    if code == isa.SOFTMAX.code:
        return 4 * (interpolation.SOFTMAX_ENTRIES if bits == 16 else 256)
    return (ofm_shape[0] + ofm_shape[1]) * (4 if code == isa.RESIZE_NEAREST.code else 16)
