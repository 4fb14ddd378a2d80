"""`qcompile debug`: which layer's quantization hurts, why, and what helps.

A layer is charged with the rounding of its weights and bias and of what it produces; rounding an input of the model is
a row of its own. Two measures, both signal to quantization noise in dB against the float model:

- alone: at the model's worst output, with only this layer quantized. One onnxruntime session a layer;
- so far: at the layer's own output, with everything up to it quantized. One session for all layers.

Formats are those of the plan, before scales are shared for the target's sake (`pipeline.harmonize`): that costs little.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from qcompiler.compile import DEFAULTS, SILENT, Prepared, Progress, prepare
from qcompiler.diagnose_causes import Measured, Statistics, Unit, explain_noise
from qcompiler.diagnose_report import Diagnosis, Finding, LayerNoise
from qcompiler.errors import QCompilerError
from qcompiler.exact_session import exact_session
from qcompiler.graph import is_op, shape_of, users, value_name
from qcompiler.layer_names import JOINT
from qcompiler.options import Options
from qcompiler.quant import operators
from qcompiler.quant.formats import dequantize_array, quantize_array
from qcompiler.quant.plan import plan
from qcompiler.quant.quantize import quantize
from qcompiler.quant.types import QuantPlan, TensorFormat, WideType
from qcompiler.quant.widths import eight_bits_only, keeps_width
from qcompiler.selfcheck import Arrays, sqnr
from qcompiler.target_loader import load_target

SAMPLES = 16
"""Enough to rank layers; each is run once per layer."""
NAMED, NAMED_SHARE = 5, 0.05
"""So many layers are explained at most, if each makes this share of the noise."""


def debug(
    model: str | os.PathLike[str],
    target: str | os.PathLike[str] = "arm-npu",
    options: Options = DEFAULTS,
    *,
    progress: Progress = SILENT,
) -> Diagnosis:
    """Measure every layer and explain the worst.

    Args:
        options: how to quantize; the first `SAMPLES` calibration samples are measured on.
        Others: as in `compile.compile`.

    Raises:
        QCompilerError: anything wrong with what was given, or a model that arrives quantized.
    """
    if options.formats.activations == "dynamic":
        raise QCompilerError(
            "--activations dynamic finds ranges at run time, so there are none to look for causes in; measure single "
            "layers by keeping them in float with --float."
        )
    offered = load_target(target, options.overrides).quantization.activations.dtypes
    wide = options.formats.activations == "int8" and "int16" in offered
    prepared = prepare(model, target, options, progress, widths=("int8", "int16") if wide else ())
    if prepared.plan is None or prepared.ranges is None:
        raise QCompilerError(
            f"{prepared.source} arrived quantized, so there is no float model to measure its layers against; give the "
            "float model it was made from."
        )

    def replan(names: Sequence[str], wide_names: Sequence[str]) -> QuantPlan:
        assert prepared.ranges is not None
        parts = {part for name in names for part in name.split(JOINT)}

        def left(asked: Mapping[str, _Asked]) -> dict[str, _Asked]:
            # What stays in float has no say in its formats.
            return {layer: item for layer, item in asked.items() if not parts & set(layer.split(JOINT))}

        formats = options.formats
        reads: dict[str, WideType] = {**left(formats.activations_by_layer), **dict.fromkeys(wide_names, "int16")}
        wanted = replace(
            formats, by_layer=left(formats.by_layer), groups=left(formats.groups), activations_by_layer=reads
        )
        return plan(prepared.graph, prepared.ranges, prepared.target, [*options.keep_float, *names], wanted)

    return _Bench(prepared, prepared.plan, replan, progress, wide=wide).diagnose()


_Asked = TypeVar("_Asked")


def units_of(model: ir.Model, plan: QuantPlan) -> list[Unit]:
    """What counts as one layer: an operator with its fused clamp, or all operators of one lookup table.

    Left out are operators that stay in float and those that only move data and so round nothing.
    """
    nodes = list(model.graph)
    regions = operators.lookup_regions(nodes)
    inner = {member for last, region in regions.items() for member in region if member is not last}
    found: list[Unit] = []
    for value in model.graph.inputs:
        if value.name in plan.activations:
            found.append(Unit(value_name(value), "input", None, value, (), ()))
    for node in nodes:
        if node.name in plan.float_nodes:
            # What a quantized operator reads from one in float is rounded on the way in.
            borders = [value for value in node.outputs if value.name in plan.activations]
            found += [Unit(value_name(value), "input", None, value, (), ()) for value in borders]
            continue
        if node in inner or operators.is_fused_clamp(node):
            continue
        clamp = operators.clamp_of(node)
        members = regions.get(node, (node, clamp) if clamp is not None else (node,))
        output = members[-1].outputs[0]
        weights = tuple(
            dict.fromkeys(
                value_name(value)
                for member in members
                for value in member.inputs
                if value is not None and value.name in plan.weights
            )
        )
        if weights or not operators.inherits_format(node):
            name = JOINT.join(member.name or "" for member in members)
            found.append(Unit(name, node.op_type, node, output, members, weights))
    return found


def _only(plan: QuantPlan, units: Iterable[Unit], *, weights: bool = True, outputs: bool = True) -> QuantPlan:
    """The plan with nothing but these layers in it, or only their weights, or only their outputs."""
    chosen = list(units)
    names = {value_name(unit.output) for unit in chosen} if outputs else set()
    initializers = {name for unit in chosen for name in unit.weights} if weights else set()
    nodes = {node.name for unit in chosen for node in unit.nodes} if weights else set()
    return replace(
        plan,
        activations={name: fmt for name, fmt in plan.activations.items() if name in names},
        conversions={name: conversion for name, conversion in plan.conversions.items() if name in names},
        weights={name: fmt for name, fmt in plan.weights.items() if name in initializers},
        biases={name: fmt for name, fmt in plan.biases.items() if name in nodes},
    )


def _float_layers(unit: Unit, units: Sequence[Unit], *, output: bool) -> list[str]:
    """What to keep in float so that nothing of a layer is rounded; if `output`, its output for those that read it too.

    An operator in float still has its output rounded on the way into a quantized one.
    """
    by_node = {node: other.name for other in units for node in other.nodes}
    found = [unit.name] if unit.node is not None else []
    waiting = list(users(unit.output)) if output or unit.node is None else []
    for node in waiting:
        if node in by_node:
            found.append(by_node[node])
        if node not in by_node or is_op(node, "Concat"):
            waiting += node.successors()  # it hands on what it reads
    return list(dict.fromkeys(found))


class _Bench:
    """The float model's outputs on the samples, and quantized variants run beside them."""

    def __init__(
        self,
        prepared: Prepared,
        plan: QuantPlan,
        replan: Callable[[Sequence[str], Sequence[str]], QuantPlan],
        progress: Progress,
        *,
        wide: bool,
    ) -> None:
        """Args:
        replan: the plan with layers of these names in float, and others reading 16 bits.
        wide: whether layers can.
        """
        self.prepared, self.plan, self.replan, self.progress, self.wide = prepared, plan, replan, progress, wide
        self.graph = prepared.graph
        self.regions = operators.lookup_regions(list(self.graph.graph))
        self.units = units_of(self.graph, plan)
        self.samples = list(islice(prepared.samples, SAMPLES))
        self.outputs = [value_name(value) for value in self.graph.graph.outputs]
        run = _runner(self.graph, self.outputs)
        self.reference = [run(sample) for sample in self.samples]

    def diagnose(self) -> Diagnosis:
        self.progress.stage("measure layers")
        total = self._sqnr(self.plan)
        so_far = self._so_far()
        alone: list[float | None] = []
        for done, unit in enumerate(self.units, start=1):
            alone.append(self._sqnr(_only(self.plan, [unit])))
            self.progress.advance(done, len(self.units))
        noises = [0.0 if value is None else 10 ** (-value / 10) for value in alone]
        whole = sum(noises)
        shares = [noise / whole if whole else 0.0 for noise in noises]
        layers = tuple(
            LayerNoise(
                unit.name,
                unit.op,
                self._read(unit),
                " ".join(dict.fromkeys(_stored(self.plan.weights[name]) for name in unit.weights)),
                self.plan.activations[value_name(unit.output)].dtype
                if unit.output.name in self.plan.activations
                else "",
                alone[index],
                so_far.get(value_name(unit.output)),
                shares[index],
            )
            for index, unit in enumerate(self.units)
        )
        worst = sorted(range(len(layers)), key=lambda index: -shares[index])[:NAMED]
        named = [index for rank, index in enumerate(worst) if shares[index] >= NAMED_SHARE or (rank == 0 and whole)]
        ranges = self.prepared.ranges
        assert ranges is not None
        return Diagnosis(
            model=self.prepared.source.name,
            target=self.prepared.target.name,
            samples=len(self.samples),
            synthetic=ranges.synthetic,
            sqnr=total,
            layers=layers,
            findings=self._findings([self.units[index] for index in named], shares=[shares[index] for index in named]),
            kept_float=dict(self.plan.float_nodes),
        )

    def _read(self, unit: Unit) -> str:
        """The types of activations a layer reads."""
        inside = {value for node in unit.nodes for value in node.outputs}
        pairs = [(value, node) for node in unit.nodes for value in node.inputs if value is not None]
        return " ".join(
            dict.fromkeys(
                self.plan.read(value_name(value), node.name or "").dtype
                for value, node in pairs
                if value not in inside and value.name in self.plan.activations
            )
        )

    # --- measuring ---------------------------------------------------------------------------------------

    def _sqnr(self, plan: QuantPlan) -> float | None:
        """SQNR of the worst output; None if no output changes."""
        run = _runner(quantize(self.graph, plan), self.outputs)
        signal, noise = np.zeros(len(self.outputs)), np.zeros(len(self.outputs))
        for sample, wanted in zip(self.samples, self.reference, strict=True):
            got = run(sample)
            for index, name in enumerate(self.outputs):
                expected = wanted[name].astype(np.float64)
                signal[index] += np.sum(expected**2)
                noise[index] += np.sum((expected - got[name]) ** 2)
        found = [sqnr(float(s), float(n)) for s, n in zip(signal, noise, strict=True)]
        return min((value for value in found if value is not None), default=None)

    def _so_far(self) -> dict[str, float | None]:
        """By output of each layer: its SQNR with everything before it and itself quantized."""
        formats = {
            value_name(unit.output): self.plan.activations[value_name(unit.output)]
            for unit in self.units
            if unit.output.name in self.plan.activations and not unit.output.is_graph_input()
        }
        names = list(formats)
        exact, rounded = _runner(self.graph, names), _runner(quantize(self.graph, self.plan), names)
        signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
        for sample in self.samples:
            wanted, got = exact(sample), rounded(sample)
            for name, fmt in formats.items():
                expected = wanted[name].astype(np.float64)
                # The named value is the one before QuantizeLinear; of an output of the model, rounding again is exact.
                held = dequantize_array(quantize_array(got[name], fmt), fmt)
                signal[name] += float(np.sum(expected**2))
                noise[name] += float(np.sum((expected - held) ** 2))
        return {name: sqnr(signal[name], noise[name]) for name in names}

    # --- explaining --------------------------------------------------------------------------------------

    def _findings(self, units: Sequence[Unit], *, shares: Sequence[float]) -> tuple[Finding, ...]:
        self.progress.stage("explain")
        statistics = self._statistics(units)
        findings: list[Finding] = []
        for done, (unit, share) in enumerate(zip(units, shares, strict=True), start=1):
            measured = Measured(
                unit,
                self._sqnr(_only(self.plan, [unit], outputs=False)) if unit.weights else None,
                self._sqnr(_only(self.plan, [unit], weights=False)),
                statistics[value_name(unit.output)],
            )
            ranges = self.prepared.ranges
            assert ranges is not None
            names = _float_layers(unit, self.units, output=not measured.weights_worse)
            wide = self._wide_layers(unit) if not measured.weights_worse else ()
            cause = explain_noise(measured, names, self.plan, ranges, self.prepared.target, wide)
            without = self._sqnr(self.replan(names, ()))
            widened = self._sqnr(self.replan((), wide)) if wide else None
            findings.append(
                Finding(unit.name, unit.op, share, cause.cause, cause.evidence, cause.advice, without, widened)
            )
            self.progress.advance(done, len(units))
        return tuple(findings)

    def _wide_layers(self, unit: Unit) -> tuple[str, ...]:
        """What reads a layer's 8-bit output and could read 16 bits, if all of it could."""
        fmt = self.plan.activations.get(value_name(unit.output))
        if not self.wide or fmt is None or fmt.dtype == "int16":
            return ()
        by_name = {other.name: other for other in self.units}
        readers = [
            name
            for name in _float_layers(unit, self.units, output=True)
            if name != unit.name and by_name[name].op != "Concat"  # which hands on what is read from it
        ]
        found = [by_name[name] for name in readers]
        fit = not any(other.node is None or self._is_narrow(other) for other in found)
        narrow = unit.node is not None and self._keeps_width(unit)
        return tuple(readers) if fit and not narrow else ()

    def _is_narrow(self, unit: Unit) -> bool:
        """Whether a layer reads 8 bits in any case."""
        region = self.regions.get(unit.nodes[-1], ())
        node = unit.nodes[-1] if region else unit.nodes[0]
        return eight_bits_only(node) is not None

    def _keeps_width(self, unit: Unit) -> bool:
        """Whether a layer makes the width it reads."""
        return keeps_width(unit.nodes[-1], self.regions.get(unit.nodes[-1], ()))

    def _statistics(self, units: Sequence[Unit]) -> Mapping[str, Statistics]:
        found = {value_name(unit.output): Statistics(unit.channel_axis, shape_of(unit.output)) for unit in units}
        computed = [name for name in found if name not in {value.name for value in self.graph.graph.inputs}]
        run = _runner(self.graph, computed) if computed else None
        for sample in self.samples:
            values = {**sample, **(run(sample) if run is not None else {})}
            for name, statistics in found.items():
                statistics.add(values[name])
        return found


def _stored(fmt: TensorFormat) -> str:
    """A type of weights, and how many share a scale: int4/32."""
    return f"{fmt.dtype}/{fmt.block}" if fmt.block else fmt.dtype


def _runner(model: ir.Model, names: Sequence[str]) -> Callable[[Arrays], Arrays]:
    """Runs a model in onnxruntime for the named values. Rounding stays where QuantizeLinear stands."""
    exposed = model.clone()
    graph = exposed.graph
    by_name = {value_name(value): value for node in graph for value in node.outputs if value.name}
    by_name |= {value_name(value): value for value in graph.inputs}
    wanted = list(names)
    if wanted != [value.name for value in graph.outputs]:
        graph.outputs.clear()
        graph.outputs.extend(by_name[name] for name in wanted)
    session = exact_session(ir.to_proto(exposed).SerializeToString())

    def run(arrays: Arrays) -> Arrays:
        outputs = session.run(wanted, dict(arrays))
        return {name: np.asarray(output) for name, output in zip(wanted, outputs, strict=True)}

    return run
