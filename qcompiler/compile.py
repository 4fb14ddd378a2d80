"""The road from a model to a bundle, stage by stage.

Everything heavy is imported where it is needed, so that running a bundle loads neither onnx nor the compiler half of
TVM.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

from qcompiler import bundle
from qcompiler.bundle import Bundle
from qcompiler.errors import QCompilerError
from qcompiler.options import CalibrationSource, InputShapes, Options
from qcompiler.quant.types import (
    ActivationType,
    HalfType,
    Quality,
    RangeMethod,
    Ranges,
    Scheme,
    Technique,
    WeightRequest,
    WeightType,
    WideType,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcompiler.backends.npu import NpuProgram
    from qcompiler.backends.relax import Lowered, RegionLowering
    from qcompiler.costs import Costs
    from qcompiler.dataset import Dataset, ImageOptions, InputSpec
    from qcompiler.emit.regions import EmitFormat
    from qcompiler.partition import Partition, Region
    from qcompiler.pipeline import Dumper
    from qcompiler.quant.types import QuantPlan
    from qcompiler.report import Report, SelfCheck, VelaReport
    from qcompiler.selfcheck import Arrays
    from qcompiler.target import Target

SYNTHETIC_SAMPLES = 8
_UNCHECKED = "the bundle cannot be checked on this machine"
EIGHT_BITS = WeightRequest()
_FLOAT, _DYNAMIC = WeightRequest(activations="float"), WeightRequest(activations="dynamic")
DEFAULTS = Options()


class Progress(Protocol):
    """Told what is going on."""

    def stage(self, name: str) -> None:
        """A stage begins."""
        ...

    def advance(self, done: int, total: int) -> None:
        """So much of the present stage is done."""
        ...


class Silent:
    """Progress nobody watches."""

    def stage(self, name: str) -> None:
        return None

    def advance(self, done: int, total: int) -> None:
        return None


SILENT = Silent()


def compile(
    model: str | os.PathLike[str],
    target: str | os.PathLike[str] = "arm-npu",
    *,
    calibration: CalibrationSource | None = None,
    output: str | os.PathLike[str] | None = None,
    input_shapes: InputShapes | None = None,
    dump: str | os.PathLike[str] | None = None,
    method: RangeMethod = "mse",
    samples: int | None = None,
    images: "ImageOptions | None" = None,
    emit: "EmitFormat | None" = None,
    keep_float: Sequence[str] = (),
    overrides: Sequence[str] = (),
    html: str | os.PathLike[str] | None = None,
    trace: str | os.PathLike[str] | None = None,
    weights: WeightType = "int8",
    layer_weights: Mapping[str, WeightType] | None = None,
    activations: ActivationType = "int8",
    all_layers: bool = False,
    group: int | None = None,
    scheme: Scheme | None = None,
    prune: str | None = None,
    half: Mapping[str, HalfType] | None = None,
    layer_activations: Mapping[str, WideType] | None = None,
    quality: Quality = "fast",
    without_repair: Sequence[Technique] = (),
    runtime: Sequence[str | os.PathLike[str]] = (),
    progress: Progress = SILENT,
) -> Bundle:
    """Compile an ONNX model to INT8 for a target and write a bundle.

    Args:
        model: the .onnx file, float or already quantized.
        target: a bundled target's name, or a YAML spec.
        calibration: arrays by input name (first axis samples), an .npz, a folder of arrays or of images. Without it
            ranges come from random inputs, and accuracy is not to be trusted; a quantized model needs none.
        output: the bundle's folder. Without it, a temporary one that lives as long as the returned `Bundle`.
        input_shapes: full shapes of inputs with symbolic dimensions.
        dump: a folder that receives the graph after every stage.
        method: how activation ranges are chosen from what calibration saw.
        samples: use the first so many calibration samples.
        images: preprocessing, if `calibration` is a folder of images.
        emit: also write the accelerator's regions for other compilers into the bundle: as TFLite, as TOSA, or as
            TFLite together with what Arm's Vela makes of it, whose estimate then stands in the report beside ours.
        keep_float: names of operators to leave in float.
        overrides: changes to the target spec, such as "memories.sram.size=512KiB".
        html: where the report goes as one HTML page.
        trace: where the timeline goes, for Perfetto or chrome://tracing.
        weights: "int4", "int2" and "binary" store the weights of all but the first and last layers in four, two or one
            bits, if the target has them.
        layer_weights: single layers that differ, by name as in reports.
        activations: "int16" computes in sixteen bits, if the target has them; what has no such form stays in float.
            "dynamic" keeps them float and quantizes what is multiplied by its own range at run time, on the CPU; it
            needs no calibration data. With a `group` it rounds each group of a row to 8 bits. "float" quantizes the
            weights of matrix products only.
        all_layers: whether `weights` is for the first and last layers too.
        group: how many weights of an output share a scale, such as 32 or 128. Beside integer activations they have less
            than 8 bits.
        scheme: how weights with float activations are rounded: "rtn", "hqq", or "gptq" and "awq", which learn from the
            calibration data. By default the quality decides.
        prune: make weights zero first, a fraction of them ("0.5") or two of every four neighbours ("2:4"); those that
            stay are changed so as to make up for it, given calibration data.
        layer_activations: layers that read another type of activations, "int16" or "int8", by name as in reports.
        half: layers in 16-bit floats by name, "float16" or "bfloat16"; the name "all" for every one.
        quality: "balanced" and "best" learn better weights and biases from the calibration data, layer by layer, in
            about a minute or ten at most.
        without_repair: techniques that the quality includes and that are to be left out, such as "gptq".
        runtime: C files that implement `runtime_stubs/abi/qrt.h`, the driver of an accelerator, to link in place of
            the simulator. The bundle is not checked then.
        progress: told of stages as they begin.

    Raises:
        QCompilerError: anything wrong with what was given; nothing is written then.
    """
    from qcompiler.quant.prune import parse as parse_prune

    options = Options(
        calibration=calibration,
        input_shapes=input_shapes or {},
        method=method,
        samples=samples,
        images=images,
        keep_float=keep_float,
        overrides=overrides,
        formats=WeightRequest(
            weights, layer_weights or {}, activations, all_layers, group, scheme, {}, layer_activations or {}
        ),
        prune=None if prune is None else parse_prune(prune),
        half=half or {},
        quality=quality,
        without_repair=without_repair,
        dump=dump,
    )
    return build(
        model, target, options, output=output, emit=emit, html=html, trace=trace, runtime=runtime, progress=progress
    )


def build(
    model: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: Options = DEFAULTS,
    *,
    output: str | os.PathLike[str] | None = None,
    emit: "EmitFormat | None" = None,
    html: str | os.PathLike[str] | None = None,
    trace: str | os.PathLike[str] | None = None,
    runtime: Sequence[str | os.PathLike[str]] = (),
    progress: Progress = SILENT,
) -> Bundle:
    """`compile`, with what concerns quantization in one `Options`. Arguments and errors as there."""
    from qcompiler import tile_database
    from qcompiler.backends import relax
    from qcompiler.backends.base import host_code
    from qcompiler.backends.memory import host_memory
    from qcompiler.backends.tiles import best_guess
    from qcompiler.report import TuningReport
    from qcompiler.simulator.machine import with_driver
    from qcompiler.target_loader import load_target

    known = load_target(target, options.overrides)
    if not known.host.loads_libraries:
        raise QCompilerError(
            f"{known.name} has no operating system that could load a bundle; write C for it with --emit c, which makes "
            "a folder that `make` builds."
        )
    if emit is not None:
        from qcompiler.emit.regions import check_emission

        if options.formats != EIGHT_BITS:
            raise QCompilerError(f"--emit {emit} knows 8-bit formats only; leave out --weights and --activations.")
        check_emission(known, emit)

    keep = TemporaryDirectory(prefix="qcompiler-") if output is None else None
    folder = Path(keep.name) / f"{Path(model).stem}.qc" if keep else Path(output or "")
    with bundle.staging(folder) as stage:
        placed = place(model, target, options, progress)
        chip = placed.target
        progress.stage("schedule")
        programs = schedule(placed)
        vela: tuple[VelaReport, ...] = ()
        if emit is not None:
            progress.stage("emit")
            vela = _emit(placed, programs, emit, stage)
        progress.stage("lower")
        drivers = _drivers(placed.partition, programs, chip)
        tiles = None if options.tiles is None else tile_database.load(Path(options.tiles), host_code(chip.host))
        choose = best_guess if tiles is None else tiles.choose
        lowered = relax.lower(placed.integer, placed.partition, chip, drivers, choose)
        if runtime:
            lowered = replace(lowered, sources=with_driver(lowered.sources, runtime))
            files = ", ".join(source.name for source in lowered.sources)
            placed = replace(placed, warnings=(*placed.warnings, f"driven by {files}, and so not run to be checked"))
        progress.stage("build")
        relax.build(lowered, chip.host, stage / bundle.LIBRARY)
        progress.stage("self-check")
        placed, check = (placed, None) if runtime else _check(placed, stage / bundle.LIBRARY, lowered)
        progress.stage("report")
        costs = _costs(placed, programs, sum(array.nbytes for array in lowered.parameters))
        report = replace(_report(placed, costs, check), vela=vela, memory=host_memory(lowered, chip.host))
        if tiles is not None and (tuned := sum(map(tiles.knows, lowered.tilings))):
            report = replace(report, tuning=TuningReport(len(lowered.tilings), tuned))
        _write_views(placed, costs, report, stage / bundle.REPORT_PAGE, None)
        bundle.write(stage, placed.source, chip, placed.quantized, placed.integer, lowered, report)
    _write_views(placed, costs, report, html, trace)
    return bundle.load(folder, keep)


def explain(
    model: str | os.PathLike[str],
    target: str | os.PathLike[str] = "arm-npu",
    options: Options = DEFAULTS,
    *,
    html: str | os.PathLike[str] | None = None,
    trace: str | os.PathLike[str] | None = None,
    progress: Progress = SILENT,
) -> "Report":
    """What `compile` would decide and what that would cost, without building. Arguments and errors as there."""
    from qcompiler.backends import relax
    from qcompiler.backends.memory import host_memory

    placed = place(model, target, options, progress)
    progress.stage("schedule")
    programs = schedule(placed)
    progress.stage("lower")
    drivers = _drivers(placed.partition, programs, placed.target, assembled=False)
    lowered = relax.lower(placed.integer, placed.partition, placed.target, drivers)
    costs = _costs(placed, programs, sum(array.nbytes for array in lowered.parameters))
    report = replace(_report(placed, costs, None), memory=host_memory(lowered, placed.target.host))
    _write_views(placed, costs, report, html, trace)
    return report


@dataclass(frozen=True)
class Placed:
    """A model for which it is decided what runs where."""

    source: Path
    target: "Target"
    samples: "Dataset"
    ranges: Ranges | None
    """None if the model arrived quantized, or ranges are found at run time."""
    quantized: "ir.Model"
    integer: "ir.Model"
    partition: "Partition"
    layers: Mapping[str, str]
    """Names of layers in the user's model, by node name of the integer graph."""
    warnings: tuple[str, ...]
    kept_float: frozenset[str]
    """Operators of the float model that the user wants in float."""


@dataclass(frozen=True)
class Prepared:
    """A model legalized for its target, and the plan to quantize it by."""

    source: Path
    target: "Target"
    samples: "Dataset"
    graph: "ir.Model"
    """Float, or QDQ if the model arrived quantized."""
    ranges: Ranges | None
    """None if the model arrived quantized, as is `plan`, or ranges are found at run time."""
    plan: "QuantPlan | None"
    warnings: tuple[str, ...]


def prepare(
    model: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: Options = DEFAULTS,
    progress: Progress = SILENT,
    dumper: "Dumper | None" = None,
    *,
    learn: bool = True,
    widths: Sequence[WideType] = (),
) -> Prepared:
    """Every stage up to planning the quantization, which goes to `dumper` if there is one. Errors as of `compile`.

    Without `learn` the plan is not repaired, whatever quality is asked for; the model may still be equalized. Ranges
    are measured for activations of these `widths` too.
    """
    from qcompiler.calibrate import calibrate
    from qcompiler.dataset import input_specs, lint
    from qcompiler.finetune.tune_scales import tune_scales
    from qcompiler.importer import import_onnx
    from qcompiler.pipeline import SIMPLIFY, legalize, run_passes
    from qcompiler.quant.dynamic import plan_dynamic
    from qcompiler.quant.half import to_half
    from qcompiler.quant.plan import plan
    from qcompiler.quant.prune import prune as prune_weights
    from qcompiler.quant.repair import (
        EFFORTS,
        change_if_better,
        closest,
        equalizers,
        repair,
        repaired_plans,
        uncorrected,
    )
    from qcompiler.quant.weight_bits import activation_dtype
    from qcompiler.quant.weight_only import has_grouped_weights, is_weight_only, note_compute, weight_only
    from qcompiler.target_loader import load_target

    left_out = options.without_repair
    source, effort = Path(model), EFFORTS[options.quality].without(left_out)
    run = partial(run_passes, dumper=dumper)
    with _Warnings(source) as warnings:
        chip = load_target(target, options.overrides)
        if (reason := foreign(chip)) is not None:
            warnings.messages.append(f"{_UNCHECKED}: {reason}")
        progress.stage("import")
        graph = import_onnx(source, options.input_shapes)
        if dumper is not None:
            dumper.dump(graph, "import")
        data = _open_data(options, input_specs(graph))
        progress.stage("simplify")
        graph = run(graph, SIMPLIFY, stage="simplify")
        graph = run(graph, legalize(chip.preferring(activation_dtype(chip, options.formats))), stage="legalize")
        _refuse_unsupported(source, graph)
        progress.stage("read samples")
        warnings.messages += [f"calibration data, {warning}" for warning in lint(data)]
        ranges = formats = None
        pruned: frozenset[str] = frozenset()
        keep_float = tuple(options.keep_float)
        if options.prune is not None:
            if _is_quantized(graph):
                raise QCompilerError(
                    f"{source} arrived quantized, so its weights stay as they are and --prune cannot be heeded; "
                    "compile the float model it was made from."
                )
            if is_weight_only(options.formats):
                raise QCompilerError(
                    "--prune is for weights beside quantized activations; leave it out, or --activations."
                )
            progress.stage("prune")
            graph, pruned = prune_weights(graph, options.prune, data, progress.advance)
        if options.half:
            if _is_quantized(graph):
                raise QCompilerError(
                    f"{source} arrived quantized, so its formats stay as they are and layers cannot become 16-bit "
                    "floats; compile the float model it was made from."
                )
            graph, halves = to_half(graph, options.half)
            keep_float += halves
        if is_weight_only(options.formats) and not _is_quantized(graph):
            progress.stage("quantize weights")
            graph, formats = weight_only(graph, options.formats, data, options.quality, keep_float, progress.advance)
        elif options.formats.activations == "dynamic" and not _is_quantized(graph):
            formats = plan_dynamic(graph, chip, keep_float, options.formats)
            formats = replace(formats, pruned=pruned)
            if effort.steps and learn:
                progress.stage("repair")
                formats = repair(graph, formats, data, effort, progress.advance)
        elif not _is_quantized(graph):
            progress.stage("calibrate")
            kinds = {options.formats.activations, *options.formats.activations_by_layer.values(), *widths}
            symmetric = chip.quantization.activations.symmetric

            def planned(graph: "ir.Model") -> "tuple[Ranges, QuantPlan]":
                measured = partial(calibrate, graph, data, options.method, progress.advance)
                ranges = wide = measured(bits=16, symmetric=True) if "int16" in kinds else None
                if "int8" in kinds or ranges is None:
                    ranges = replace(measured(bits=8, symmetric=symmetric), wide=None if wide is None else wide.by_name)
                made = plan(graph, ranges, chip, keep_float, options.formats)
                made = uncorrected(graph, made) if "bias" in left_out else made
                return ranges, replace(made, pruned=pruned)

            ranges, formats = planned(graph)
            if options.quality != "fast" and not data.synthetic:
                progress.stage("equalize")
                per_channel = chip.quantization.weights.per_channel
                for change in equalizers(graph, data, per_channel=per_channel, without=left_out):
                    graph, ranges, formats = change_if_better(graph, change, ranges, formats, planned, data)
            if (effort.steps or effort.tuning_seconds) and learn:
                progress.stage("repair")
                plans = repaired_plans(graph, formats, data, effort, progress.advance)
                formats = closest(graph, plans, data)
                if effort.tuning_seconds:
                    progress.stage("tune scales")
                    shifts = chip.quantization.requantize == "shift"
                    formats = tune_scales(
                        graph,
                        formats,
                        data,
                        effort.tuning_seconds,
                        variants=effort.variants,
                        power_of_two=shifts,
                        progress=progress.advance,
                    )
        elif has_grouped_weights(graph) and options.formats in (_FLOAT, _DYNAMIC):
            note_compute(graph, options.formats)
        elif options.formats != EIGHT_BITS:
            raise QCompilerError(
                f"{source} arrived quantized, so its formats stay as they are and --weights and --activations cannot "
                "be heeded; compile the float model it was made from."
            )
        elif options.keep_float:
            raise QCompilerError(
                f"{source} arrived quantized, so its scales stand and --float {options.keep_float[0]} cannot be "
                "heeded; compile the float model it was made from."
            )
    return Prepared(source, chip, data, graph, ranges, formats, tuple(warnings.messages))


def place(
    model: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: Options = DEFAULTS,
    progress: Progress = SILENT,
) -> Placed:
    """Every stage up to partitioning. Errors as of `compile`."""
    from qcompiler.pipeline import Dumper

    dumper = Dumper(Path(options.dump)) if options.dump is not None else None
    return place_prepared(prepare(model, target, options, progress, dumper), progress, dumper)


def place_prepared(prepared: Prepared, progress: Progress = SILENT, dumper: "Dumper | None" = None) -> Placed:
    """The stages of `place` from the plan on; `prepared` stays as it is, unless it arrived quantized."""
    from qcompiler.backends.accelerators import can_run
    from qcompiler.integer.realize import realize
    from qcompiler.layer_names import layer_names
    from qcompiler.partition import partition
    from qcompiler.pipeline import LAYOUT, harmonize, run_passes
    from qcompiler.quant.plan import ON_REQUEST
    from qcompiler.quant.quantize import quantize

    run = partial(run_passes, dumper=dumper)

    def dumped(model: "ir.Model", stage: str) -> "ir.Model":
        if dumper is not None:
            dumper.dump(model, stage)
        return model

    source, chip, graph = prepared.source, prepared.target, prepared.graph
    with _Warnings(source) as warnings:
        if prepared.plan is not None:
            progress.stage("quantize")
            graph = dumped(quantize(graph, prepared.plan), "quantize")
        graph = run(graph, harmonize(chip), stage="harmonize")
        quantized = graph.clone()
        progress.stage("realize")
        graph = dumped(realize(graph, chip), "realize")
        graph = run(graph, LAYOUT, stage="layout")
        progress.stage("partition")
        _refuse_unsupported(source, graph)
        parts = partition(graph, chip, can_run=partial(can_run, target=chip))
    reasons = prepared.plan.float_nodes if prepared.plan is not None else {}
    kept_float = (name for name, reason in reasons.items() if reason == ON_REQUEST)
    return Placed(
        source, chip, prepared.samples, prepared.ranges, quantized, graph, parts, layer_names(quantized, graph),
        (*prepared.warnings, *warnings.messages), frozenset(kept_float),
    )  # fmt: skip


def schedule(placed: Placed) -> "dict[str, NpuProgram]":
    """Plan memory and tiles of the regions that drivers run; by region name."""
    from qcompiler.backends.npu import compile_region
    from qcompiler.target import Npu

    return {
        region.name: compile_region(region, placed.target.alone(region.backend))
        for region in placed.partition.regions
        if region.backend != "cpu" and isinstance(placed.target.accelerators[region.backend], Npu)
    }


def estimate(placed: Placed, progress: Progress = SILENT) -> "tuple[Report, Costs]":
    """What a placed model would cost, without building it."""
    from qcompiler.partition_cost import constant_bytes
    from qcompiler.recurrent import constants_read

    progress.stage("schedule")
    programs = schedule(placed)
    weights = sum(constant_bytes(value, placed.target.host) for value in constants_read(placed.integer.graph))
    costs = _costs(placed, programs, weights)
    return _report(placed, costs, None), costs


# --- details ------------------------------------------------------------------------------------------------


class _Warnings(logging.Handler):
    """Collects what the compiler's loggers warn of, for the report."""

    def __init__(self, source: Path) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self._prefix = f"{source}: "

    def emit(self, record: logging.LogRecord) -> None:
        # Without the path: a report must not depend on where the model lay.
        self.messages.append(record.getMessage().removeprefix(self._prefix))

    def __enter__(self) -> "_Warnings":
        logging.getLogger("qcompiler").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("qcompiler").removeHandler(self)


def _open_data(options: Options, inputs: "tuple[InputSpec, ...]") -> "Dataset":
    from qcompiler.dataset import load_dataset, synthetic

    if options.calibration is None:
        return synthetic(inputs, SYNTHETIC_SAMPLES)
    source = options.calibration if isinstance(options.calibration, Mapping) else Path(options.calibration)
    return load_dataset(source, inputs, options.images, options.samples)


def _emit(
    placed: Placed, programs: "Mapping[str, NpuProgram]", form: "EmitFormat", folder: Path
) -> "tuple[VelaReport, ...]":
    from qcompiler.costs import region_cost
    from qcompiler.emit.regions import emit_regions

    backends = {region.name: region.backend for region in placed.partition.regions}
    on_npu = {name: program for name, program in programs.items() if backends[name] == "npu"}
    costs = {name: region_cost(program, placed.target) for name, program in on_npu.items()}
    return emit_regions(placed.partition, costs, placed.target, form, folder)


def _drivers(
    partition: "Partition", programs: "Mapping[str, NpuProgram]", target: "Target", *, assembled: bool = True
) -> "RegionLowering":
    """Makes the code that runs an accelerator's region. Regions are numbered in the simulator's log.

    Unless `assembled`, kernels of a GPU stay source, which takes no tools.
    """
    from qcompiler.backends import gpu, npu
    from qcompiler.backends.base import AcceleratorFunction
    from qcompiler.backends.gpu_binary import binary, unassembled

    numbers = {region.name: number for number, region in enumerate(partition.regions)}

    def lower(region: "Region") -> AcceleratorFunction:
        if region.name in programs:
            return npu.region_function(programs[region.name], numbers[region.name])
        return gpu.region_function(region, target, numbers[region.name], binary if assembled else unassembled)

    return lower


def _runner(library: Path, lowered: "Lowered") -> "Callable[[Arrays], Arrays]":
    """Run the library just built, by input and output name."""
    from qcompiler.runtime import Executable

    executable = Executable(library, lowered.parameters)

    def run(arrays: "Arrays") -> "Arrays":
        outputs = executable.run([arrays[spec.name] for spec in lowered.inputs])
        return {spec.name: output for spec, output in zip(lowered.outputs, outputs, strict=True)}

    return run


def _check(placed: Placed, library: Path, lowered: "Lowered") -> "tuple[Placed, SelfCheck | None]":
    """The self-check, with warnings of what it finds; none if the library is for another CPU, or for a GPU that is not
    here, which becomes a warning too."""
    from qcompiler.runtime import gpu_problem
    from qcompiler.selfcheck import doubts, self_check

    if foreign(placed.target) is not None:
        return placed, None
    if (problem := gpu_problem(library)) is not None:
        return replace(placed, warnings=(*placed.warnings, f"{_UNCHECKED}: {problem}")), None
    check = self_check(placed.source, _runner(library, lowered), placed.samples)
    return replace(placed, warnings=(*placed.warnings, *doubts(check, placed.source.name))), check


def foreign(target: "Target") -> str | None:
    """Why code for the target's CPU cannot run on this machine, or None if it can."""
    from qcompiler.host_cpu import why_not_here

    cpu = bundle.cpu_of(target.host)
    return why_not_here(cpu.architecture, cpu.flags)


def _costs(placed: Placed, programs: "Mapping[str, NpuProgram]", weights: int) -> "Costs":
    from qcompiler.costs import cost

    return cost(placed.partition, programs, placed.target, weights, placed.layers)


def _report(placed: Placed, costs: "Costs", check: "SelfCheck | None") -> "Report":
    from qcompiler.graph import input_of
    from qcompiler.integer.weight_groups import groups_of
    from qcompiler.quant.plan import ON_REQUEST
    from qcompiler.report import AlternativeReport, Calibration, PlacementReport, RegionReport, Report

    ranges = placed.ranges
    nodes = {node.name: node for node in placed.integer.graph}
    return Report(
        model=placed.source.name,
        target=placed.target.name,
        placements=tuple(
            PlacementReport(
                placed.layers[item.node],
                item.node,
                item.op,
                item.backend,
                item.engine,
                item.precision,
                ON_REQUEST if item.node in placed.kept_float else item.reason,
                item.seconds,
                tuple(AlternativeReport(other.backend, other.seconds, other.refusal) for other in item.alternatives),
                str(groups_of(input_of(nodes[item.node], 1)) or ""),
            )
            for item in placed.partition.placements
        ),
        layers=costs.layers,
        totals=costs.totals,
        calibration=None if ranges is None else Calibration(ranges.method, ranges.samples, ranges.synthetic),
        self_check=check,
        warnings=placed.warnings,
        regions=tuple(
            RegionReport(region.name, region.backend, len(region.nodes), cost.seconds, cost.elsewhere)
            for region, cost in zip(placed.partition.regions, placed.partition.costs, strict=True)
        ),
        cascades=costs.cascades,
    )


def _write_views(
    placed: Placed,
    costs: "Costs",
    report: "Report",
    html: str | os.PathLike[str] | None,
    trace: str | os.PathLike[str] | None,
) -> None:
    from qcompiler.simulator.trace import inference_trace
    from qcompiler.views.html import html_report
    from qcompiler.views.timeline import timeline

    line = timeline(placed.partition, costs)
    if html is not None:
        _write_text(Path(html), html_report(report, line, placed.target))
    if trace is not None:
        _write_text(Path(trace), inference_trace(line, placed.target.name))


def _write_text(file: Path, text: str) -> None:
    try:
        file.write_text(text, "utf-8", newline="\n")
    except OSError as error:
        raise QCompilerError(f"cannot write {file}: {error.strerror}.") from None


def _refuse_unsupported(source: Path, model: "ir.Model") -> None:
    """Name every operator that neither the accelerator nor the CPU runs, before time is spent on the model."""
    from qcompiler.backends.float_ops import unsupported

    found = unsupported(model)
    if found:
        listed = "; ".join(f"{item.node!r} ({item.op}): {item.reason}" for item in found)
        raise QCompilerError(
            f"{source} has operators nothing here can run: {listed}. Export the model without them, or cut it before "
            "the first one."
        )


def _is_quantized(model: "ir.Model") -> bool:
    """Whether activations are quantized already, or meant to stay float, as weights with scales in groups say."""
    from qcompiler.graph import nodes_of
    from qcompiler.quant.weight_only import has_grouped_weights

    quantizers = nodes_of(model.graph, "QuantizeLinear", "DynamicQuantizeLinear")
    return bool(quantizers) or has_grouped_weights(model)
