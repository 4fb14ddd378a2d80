"""Places, prices and runs a model with any choice of formats."""

import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompiler.compile import SILENT, Placed, Prepared, Progress, place_prepared
from qcompiler.dataset import Dataset, input_specs, load_dataset
from qcompiler.errors import QCompilerError
from qcompiler.options import CalibrationSource, Options
from qcompiler.quant.half import to_half
from qcompiler.quant.moments import Sample
from qcompiler.quant.plan import plan
from qcompiler.quant.repair import learns_from
from qcompiler.quant.types import Quality, QuantPlan, WeightRequest
from qcompiler.search.forms import LayerFormat
from qcompiler.search.labels import labels_beside, read_labels
from qcompiler.search.layers import Assignment, Layer, Request, compose, request
from qcompiler.search.measure import Measured, SampleSource, measure
from qcompiler.search.pricing import Cost, exact

FEWEST_LEFT = 16
"""Calibration samples, below which all are measured on, learned from or not."""
JUDGED = 256
"""Calibration samples that models are run on, at most."""


@dataclass(frozen=True)
class Picked:
    """Some of the first samples of a data set."""

    source: Dataset
    used: np.ndarray
    """bool; what lies beyond its end is not used either."""

    def __iter__(self) -> Iterator[Sample]:
        return (sample for sample, use in zip(self.source, self.used, strict=False) if use)


def learned(index: int, count: int, quality: Quality) -> bool:
    """Whether weights are learned from the sample of this index of so many, while others are left."""
    return quality != "fast" and count >= FEWEST_LEFT and learns_from(index, count)


@dataclass(frozen=True)
class Judges:
    """The samples that models are run on. Choices are made by calibration data alone."""

    graph: ir.Model
    """The float model."""
    calibration: SampleSource
    """Those that repair does not learn from, if it is asked for: it would look better on the others than it is."""
    calibration_labels: np.ndarray | None
    evaluation: Dataset | None
    evaluation_labels: np.ndarray | None

    def judge(self, models: Sequence[Callable[[], ir.Model]], progress: Progress = SILENT) -> list[Measured]:
        """On calibration data."""
        return measure(self.graph, models, self.calibration, self.calibration_labels, progress.advance)

    def verify(self, models: Sequence[Callable[[], ir.Model]], progress: Progress = SILENT) -> list[Measured]:
        """On evaluation data if there are any."""
        if self.evaluation is None:
            return self.judge(models, progress)
        return measure(self.graph, models, self.evaluation, self.evaluation_labels, progress.advance)


def open_judges(
    prepared: Prepared,
    options: Options,
    evaluation: CalibrationSource | None,
    labels: str | os.PathLike[str] | None,
) -> Judges:
    """Open the data points are judged by. Raises QCompilerError if they do not fit the model or each other."""
    specs = input_specs(prepared.graph)
    inputs = [spec.name for spec in specs]
    count = min(JUDGED, len(prepared.samples))
    used = np.array([not learned(index, len(prepared.samples), options.quality) for index in range(count)])
    calibration = Picked(prepared.samples, used)
    known = labels_beside(options.calibration, inputs, count)
    known = known[used] if known is not None else None
    if evaluation is None:
        if labels is not None:
            raise QCompilerError("--labels are those of the samples of --evaluate; give both.")
        return Judges(prepared.graph, calibration, known, None, None)
    source = evaluation if isinstance(evaluation, Mapping) else Path(evaluation)
    opened = load_dataset(source, specs, options.images)
    count = len(opened)
    classes = labels_beside(evaluation, inputs, count) if labels is None else read_labels(labels, count)
    return Judges(prepared.graph, calibration, known, opened, classes)


@dataclass(frozen=True)
class Workshop:
    """Makes the model with any choice of formats, and remembers what it costs and how it measured."""

    prepared: Prepared
    options: Options
    base: WeightRequest
    layers: Sequence[Layer]
    plans: Mapping[LayerFormat, QuantPlan]
    """By format of weights, with that format in every layer that admits it."""
    judges: Judges
    _costs: dict[Assignment, Cost] = field(default_factory=dict)
    _judged: dict[Assignment, Measured] = field(default_factory=dict)
    _bases: dict[Hashable, tuple[ir.Model, QuantPlan]] = field(default_factory=dict)
    """By layers in floats and what layers read: the model and the plan in which they do so, weights apart."""

    def place(self, chosen: Assignment) -> Placed:
        wanted = request(self.layers, chosen, self.base)
        eight = replace(wanted.formats, by_layer={}, groups={})
        key = (wanted.floats, *(tuple(names.items()) for names in (wanted.halves, eight.activations_by_layer)))
        if key not in self._bases:
            self._bases[key] = self._planned(replace(wanted, formats=eight))
        graph, base = self._bases[key]
        mixed = compose(graph, base, self.layers, chosen, self.plans, lambda: self._planned(wanted)[1])
        return place_prepared(replace(self.prepared, graph=graph, plan=mixed))

    def _planned(self, wanted: Request) -> tuple[ir.Model, QuantPlan]:
        """The model with layers in 16-bit floats, and its plan, nothing repaired."""
        assert self.prepared.ranges is not None
        graph, halves = to_half(self.prepared.graph, wanted.halves) if wanted.halves else (self.prepared.graph, ())
        kept = (*self.options.keep_float, *wanted.floats, *halves)
        return graph, plan(graph, self.prepared.ranges, self.prepared.target, kept, wanted.formats)

    def cost(self, chosen: Assignment) -> Cost:
        """Of the whole model, by the target's cost model."""
        if chosen not in self._costs:
            self._costs[chosen] = exact(self.place(chosen))
        return self._costs[chosen]

    def quantized(self, chosen: Assignment) -> ir.Model:
        """The QDQ model that would be compiled."""
        placed = self.place(chosen)
        self._costs.setdefault(chosen, exact(placed))
        return placed.quantized

    def judged(self, chosen: Assignment) -> Measured:
        """On calibration data."""
        if chosen not in self._judged:
            (self._judged[chosen],) = self.judges.judge([partial(self.quantized, chosen)])
        return self._judged[chosen]

    def verified(self, choices: Sequence[Assignment], progress: Progress = SILENT) -> list[Measured]:
        """On evaluation data if there are any."""
        return self.judges.verify([partial(self.quantized, chosen) for chosen in choices], progress)
