"""A target in tables, for people to read: what `qcompile targets show` prints."""

from dataclasses import dataclass, replace

from qcompiler.target import (
    BYTE_UNITS,
    Bandwidth,
    DotArray,
    Duration,
    Engine,
    Gpu,
    Host,
    MacArray,
    Npu,
    OpRule,
    Simd,
    Systolic,
    Target,
)

Row = tuple[str, ...]

_RATE_HEADS = ("engine", "work", "rate", "energy")


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of as many cells."""

    title: str
    columns: Row
    rows: tuple[Row, ...]


def describe(target: Target) -> tuple[Table, ...]:
    """Identity and quantization, then each accelerator's memories, engines and rules, then the host and sources."""
    tables = [_identity(target)]
    for name, unit in target.accelerators.items():
        own = _gpu_tables(unit) if isinstance(unit, Gpu) else _npu_tables(unit)
        several = len(target.accelerators) > 1
        tables += [replace(table, title=f"{name.upper()}: {table.title}") if several else table for table in own]
    return (*tables, _host(target.host), Table("Sources", ("source",), tuple((line,) for line in target.sources)))


def _identity(target: Target) -> Table:
    quantization = target.quantization
    weights, activations = quantization.weights, quantization.activations
    rows = [
        ("name", target.name),
        ("description", target.description),
        ("activations", f"{', '.join(activations.dtypes)}, {_symmetry(activations.symmetric)}"),
        (
            "weights",
            f"{', '.join(weights.dtypes)}, {_symmetry(weights.symmetric)}, "
            f"per {'channel' if weights.per_channel else 'tensor'}{', narrow range' if weights.narrow_range else ''}"
            + (f", in groups of multiples of {weights.group_multiple}" if weights.group_multiple else ""),
        ),
        ("requantize", quantization.requantize),
        ("shared scale", ", ".join(quantization.shared_scale)),
    ]
    for name, unit in target.accelerators.items():
        whose = f"{name} " if len(target.accelerators) > 1 else ""
        rows += [
            (f"{whose}clock", _hertz(unit.clock)),
            (f"{whose}idle power", f"{unit.idle_power * 1e3:g} mW"),
            (f"{whose}crossing", f"{_duration(unit.crossing.sync)}, {_bandwidth(unit.crossing.bandwidth)}"),
        ]
    return Table("Target", ("", ""), tuple(rows))


def _npu_tables(npu: Npu) -> tuple[Table, ...]:
    return _memories(npu), _dma(npu), _engines(npu), _rates(npu), _rules(npu)


def _gpu_tables(gpu: Gpu) -> tuple[Table, ...]:
    rows: list[Row] = [
        ("API", f"{gpu.api}{''.join(f', {name}' for name in gpu.architectures)}"),
        ("features", ", ".join(gpu.features) or "none"),
        ("compute units", f"{gpu.compute_units}, each with {_bytes(gpu.local_memory)} of local memory"),
        ("memory", f"{_bytes(gpu.memory.size)}, {_bandwidth(gpu.memory.bandwidth)}"),
        ("memory energy", f"{gpu.memory.energy.read:g} / {gpu.memory.energy.write:g} pJ/B"),
        ("launch", _duration(gpu.launch)),
    ]
    rates: list[Row] = []
    for name, engine in gpu.engines.items():
        for precision, cost in engine.precisions.items():
            rates.append((name, precision, f"{cost.rate:g} MAC/cycle", f"{cost.energy:g} pJ/MAC"))
        rates.append((name, "elements", f"{engine.element_rate:g} element/cycle", ""))
    return Table("GPU", ("", ""), tuple(rows)), Table("Rates", _RATE_HEADS, tuple(rates)), _rules(gpu)


def _memories(npu: Npu) -> Table:
    rows = tuple(
        (
            name,
            memory.kind,
            _bytes(memory.size),
            _bandwidth(memory.bandwidth),
            _duration(memory.latency),
            _bytes(memory.burst),
            _bytes(memory.alignment),
            f"{memory.energy.read:g} / {memory.energy.write:g} pJ/B",
        )
        for name, memory in npu.memories.items()
    )
    heads = ("memory", "kind", "size", "bandwidth", "latency", "burst", "alignment", "energy read / write")
    return Table("Memories", heads, rows)


def _dma(npu: Npu) -> Table:
    rows = tuple(
        (
            name,
            ", ".join(str(path) for path in dma.paths),
            str(dma.channels),
            _bandwidth(dma.bandwidth),
            _duration(dma.setup),
        )
        for name, dma in npu.dma.items()
    )
    return Table("DMA", ("DMA", "paths", "channels", "bandwidth", "setup"), rows)


def _engines(npu: Npu) -> Table:
    rows = tuple(
        (name, _geometry(engine), _duration(engine.issue), _sparsity(engine)) for name, engine in npu.engines.items()
    )
    return Table("Engines", ("engine", "geometry", "issue", "zeros skipped"), rows)


def _sparsity(engine: Engine) -> str:
    if engine.sparsity is None:
        return ""
    return f"{engine.sparsity.pattern}, {engine.sparsity.speedup:g} times as fast"


def _geometry(engine: Engine) -> str:
    match engine.geometry:
        case MacArray() as array:
            cores = f"{array.cores} cores of " if array.cores > 1 else ""
            ublock, limit = ("x".join(str(size) for size in sizes) for sizes in (array.ublock, array.block_max))
            return f"{cores}MAC array, micro-block {ublock}, block up to {limit}, {array.accumulator_banks} banks"
        case Systolic() as array:
            return f"{array.rows}x{array.cols} systolic array, {array.dataflow.replace('_', ' ')}"
        case DotArray() as array:
            return f"{array.kernels} dot products of {array.channels} channels"
        case Simd() as unit:
            return f"{unit.lanes}-lane vector unit"


def _rates(npu: Npu) -> Table:
    rows: list[Row] = []
    for name, engine in npu.engines.items():
        for precision, cost in engine.precisions.items():
            rows.append((name, precision, f"{cost.rate:g} MAC/cycle", f"{cost.energy:g} pJ/MAC"))
        if isinstance(engine.geometry, Simd):
            for kind, rate in engine.geometry.element_rate.items():
                rows.append((name, kind, f"{rate:g} element/cycle", ""))
    return Table("Rates", _RATE_HEADS, tuple(rows))


def _rules(unit: Npu | Gpu) -> Table:
    rows = tuple(
        (", ".join(rule.ops), rule.engine, ", ".join(rule.precisions), _constraints(rule), rule.note)
        for rule in unit.rules
    )
    return Table("Rules (the first that holds wins)", ("operators", "engine", "precisions", "where", "note"), rows)


def _constraints(rule: OpRule) -> str:
    return ", ".join(f"{field} {bound.text}" for field, bound in rule.where.items())


def _host(host: Host) -> Table:
    rows: list[Row] = [
        ("TVM target", ", ".join(f"{key}: {_plain(item)}" for key, item in host.resolved_tvm_target().items())),
        ("detected", "yes" if host.is_this_machine else "no"),
        ("clock", _hertz(host.clock)),
        ("threads", str(host.threads)),
        *((f"rate {precision}", f"{rate:g} MAC/cycle") for precision, rate in host.rates().items()),
        ("element rate", f"{host.element_rate:g} element/cycle"),
        ("energy", f"{host.mac_energy:g} pJ/MAC, {host.byte_energy:g} pJ/B"),
    ]
    return Table("Host CPU", ("", ""), tuple(rows))


def _plain(item: str | int | tuple[str, ...]) -> str:
    return " ".join(item) if isinstance(item, tuple) else str(item)


def _symmetry(symmetric: bool) -> str:
    return "symmetric" if symmetric else "asymmetric"


def _bytes(count: int) -> str:
    unit, size = next((unit, size) for unit, size in reversed(BYTE_UNITS.items()) if count >= size or size == 1)
    return f"{count / size:g} {unit}"


def _hertz(value: float) -> str:
    return f"{value / 1e9:g} GHz" if value >= 1e9 else f"{value / 1e6:g} MHz"


def _duration(duration: Duration) -> str:
    if duration.unit == "cycles":
        return f"{duration.value:g} cycles"
    return f"{duration.value * 1e9:g} ns" if duration.value < 1e-6 else f"{duration.value * 1e6:g} us"


def _bandwidth(bandwidth: Bandwidth) -> str:
    return f"{bandwidth.value:g} B/cycle" if bandwidth.unit == "B/cycle" else f"{bandwidth.value / 1e9:g} GB/s"
