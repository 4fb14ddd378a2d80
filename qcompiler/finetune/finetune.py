"""The road of `qcompile finetune`: float ONNX in, quantized ONNX out, and how much it gained."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from qcompiler.calibrate import calibrate
from qcompiler.compile import SILENT, Prepared, Progress, prepare
from qcompiler.dataset import Dataset, input_specs, load_dataset
from qcompiler.errors import QCompilerError
from qcompiler.finetune.four_bits import with_four_bits
from qcompiler.finetune.options import Schedule, TrainedActivations
from qcompiler.finetune.results import Finetuned
from qcompiler.options import CalibrationSource, Options
from qcompiler.pipeline import harmonize, run_passes
from qcompiler.quant.dynamic import shift_bias
from qcompiler.quant.formats import bit_width
from qcompiler.quant.moments import Sample
from qcompiler.quant.plan import plan
from qcompiler.quant.quantize import quantize
from qcompiler.quant.types import QuantPlan
from qcompiler.quantized_file import write_model
from qcompiler.search.labels import labels_beside, read_labels
from qcompiler.search.measure import classes_of, measure
from qcompiler.target import Target

if TYPE_CHECKING:
    import torch  # pyright: ignore[reportMissingImports]

    from qcompiler.finetune.training import Lesson

DEFAULTS = Schedule()
HELD_OUT = 8
"""Without data for evaluation, one calibration sample of so many is kept from training."""
RATE, RATE_OF_FEW_BITS = 2e-3, 3e-2
"""Adam's at the beginning; weights of less than four bits have farther to go."""
FEWEST_HELD_OUT = 4
"""Samples; with fewer, everything is learned from and judged by."""


def finetune(
    model: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: Options,
    output: Path,
    *,
    activations: TrainedActivations = "int8",
    schedule: Schedule = DEFAULTS,
    evaluation: CalibrationSource | None = None,
    labels: str | os.PathLike[str] | None = None,
    progress: Progress = SILENT,
) -> Finetuned:
    """Train a float model with the roundings of its quantized form, and write that form.

    Args:
        model: the float ONNX file.
        target: decides what is rounded to what.
        options: as of `compile`. What is calibrated on is also learned from; labels in its .npz count, if any.
        output: the quantized ONNX file; `compile` takes it as it is.
        activations: formats of activations; those of weights are in `options.formats`.
        schedule: how long and how fast.
        evaluation: samples to measure on. Without them a part of the calibration data is kept for that.
        labels: classes of `evaluation`, if they are not in it.
        progress: told of stages as they begin.

    Raises:
        QCompilerError: PyTorch is not installed, the model is quantized already or has an operator that cannot be
            trained through, there are no samples, or what `compile` raises.
    """
    require_torch()
    if options.calibration is None:
        raise QCompilerError("finetuning learns from samples: give some with --calibration.")
    formats = options.formats
    others = formats.activations_by_layer or formats.group is not None or any(formats.groups.values())
    if formats.activations != "int8" or others or options.prune is not None:
        raise QCompilerError(
            "finetuning knows static 8-bit formats, weights of fewer bits with a scale per output, and four-bit "
            "activations (`activations` of finetune itself); leave out other activations, groups and pruning."
        )
    if labels is not None and evaluation is None:
        raise QCompilerError("--labels are those of the samples of --evaluate; give both.")
    prepared = prepare(model, target, options, progress, learn=False)
    if prepared.plan is None:
        raise QCompilerError(
            f"{prepared.source} arrived quantized; finetuning starts from the float model it was made from."
        )
    rounded = _four_bits(prepared, options, progress) if activations == "int4" else prepared.plan
    data = _open(prepared, options, evaluation, labels)

    from qcompiler.finetune.network import Network
    from qcompiler.finetune.training import run_batches, train

    shifted, unshifted = _shifted_biases(prepared.graph, rounded)
    power_of_two = prepared.target.quantization.requantize == "shift"
    network = Network(shifted.graph, unshifted, power_of_two=power_of_two)
    progress.stage("run the float model")
    teacher = Network(prepared.graph.graph)
    inputs = _stacked(data.learned)
    lesson = _lesson(inputs, run_batches(teacher, inputs, schedule.batch), data.labels)
    progress.stage("train")
    losses = train(network, lesson, schedule, schedule.rate or _rate(rounded), progress.advance)
    progress.stage("quantize")
    tuned = _with_constants(shifted, network.learned_constants())
    candidates = [
        partial(_harmonized, prepared.graph, rounded, prepared.target),
        partial(_harmonized, tuned, network.learned_plan(), prepared.target),
    ]
    progress.stage("measure")
    before, after = measure(prepared.graph, candidates, data.judged, data.judged_labels, progress.advance)
    progress.stage("write")
    written = write_model(candidates[1](), prepared.source, output)
    return Finetuned(written, before, after, data.held_out, tuple(losses), lesson.samples)


def require_torch() -> None:
    """Raises QCompilerError if PyTorch is not installed."""
    if find_spec("torch") is None:
        raise QCompilerError("finetuning needs PyTorch, which is not installed: pip install 'qcompiler[finetune]'.")


# --- formats ------------------------------------------------------------------------------------------------


def _four_bits(prepared: Prepared, options: Options, progress: Progress) -> QuantPlan:
    assert prepared.plan is not None
    progress.stage("calibrate for four bits")
    graph, chip = prepared.graph, prepared.target
    symmetric = chip.quantization.activations.symmetric
    ranges = calibrate(graph, prepared.samples, options.method, progress.advance, bits=4, symmetric=symmetric)
    four = plan(graph, ranges, chip, options.keep_float, options.formats)
    return with_four_bits(graph.graph, prepared.plan, four, ranges.by_name, chip, edges=options.formats.edges)


def _rate(rounded: QuantPlan) -> float:
    few = any(bit_width(fmt.dtype) < 4 for fmt in rounded.weights.values())
    return RATE_OF_FEW_BITS if few else RATE


def _shifted_biases(model: ir.Model, rounded: QuantPlan) -> tuple[ir.Model, QuantPlan]:
    """A copy in which the plan's corrections are part of the biases, to be learned with them."""
    copy = model.clone()
    for node in copy.graph:
        if (shift := rounded.bias_shifts.get(node.name or "")) is not None:
            shift_bias(node, shift)
    return copy, replace(rounded, bias_shifts={})


def _with_constants(model: ir.Model, arrays: Mapping[str, np.ndarray]) -> ir.Model:
    """A copy with other initializers of the same shapes."""
    copy = model.clone()
    for name, array in arrays.items():
        copy.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return copy


def _harmonized(model: ir.Model, rounded: QuantPlan, target: Target) -> ir.Model:
    """The QDQ model that is compiled for the target."""
    return run_passes(quantize(model, rounded), harmonize(target), stage="harmonize")


# --- data ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Every:
    """Every n-th sample of a data set, or all the others."""

    source: Dataset
    step: int
    chosen: bool

    def __iter__(self) -> Iterator[Sample]:
        return (sample for index, sample in enumerate(self.source) if self.takes(index))

    def takes(self, index: int) -> bool:
        return (index % self.step == self.step - 1) == self.chosen


@dataclass(frozen=True)
class _Data:
    learned: Dataset | _Every
    labels: np.ndarray | None
    judged: Dataset | _Every
    judged_labels: np.ndarray | None
    held_out: bool


def _open(
    prepared: Prepared,
    options: Options,
    evaluation: CalibrationSource | None,
    labels: str | os.PathLike[str] | None,
) -> _Data:
    """What is learned from and what is measured on."""
    specs, samples = input_specs(prepared.graph), prepared.samples
    names, count = [spec.name for spec in specs], len(samples)
    known = labels_beside(options.calibration, names, count)
    if evaluation is not None:
        source = evaluation if isinstance(evaluation, Mapping) else Path(evaluation)
        judged = load_dataset(source, specs, options.images)
        found = labels_beside(evaluation, names, len(judged)) if labels is None else read_labels(labels, len(judged))
        return _Data(samples, known, judged, found, held_out=True)
    if count < HELD_OUT * FEWEST_HELD_OUT:
        return _Data(samples, known, samples, known, held_out=False)
    learned, judged = (_Every(samples, HELD_OUT, chosen) for chosen in (False, True))

    def theirs(part: _Every) -> np.ndarray | None:
        return None if known is None else known[[index for index in range(count) if part.takes(index)]]

    return _Data(learned, theirs(learned), judged, theirs(judged), held_out=True)


def _stacked(samples: Dataset | _Every) -> "dict[str, torch.Tensor]":
    """All samples in memory: [samples, *shape] by input name."""
    import torch  # pyright: ignore[reportMissingImports]

    rows = list(samples)
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def _lesson(
    inputs: "Mapping[str, torch.Tensor]", outputs: "Mapping[str, torch.Tensor]", labels: np.ndarray | None
) -> "Lesson":
    import torch  # pyright: ignore[reportMissingImports]

    from qcompiler.finetune.training import Lesson

    sample, answer = ({name: tensor[0].numpy() for name, tensor in each.items()} for each in (inputs, outputs))
    classes = classes_of(answer, answer, sample)
    return Lesson(inputs, outputs, classes, None if labels is None else torch.from_numpy(labels))
