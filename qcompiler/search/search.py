"""`qcompile search`: formats for each layer, by accuracy and cost, within budgets.

1. `format_plans`, `sensitivities`: what each layer costs in accuracy in each format, on calibration data.
2. `price`: what it costs in time, energy and bytes, by the target's cost model; and each change of width between them.
3. `Problem.solve`: choices by integer programming, for a sweep of limits (the front) and for the budget.
4. Every point is then estimated and run whole; the chosen one once more with all the repair that was asked for.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir
from scipy.stats import rankdata

from qcompiler.compile import DEFAULTS, SILENT, Placed, Progress, place_prepared, prepare
from qcompiler.errors import QCompilerError
from qcompiler.options import CalibrationSource, Options
from qcompiler.quant.types import WeightRequest
from qcompiler.quant.weight_bits import activation_dtype
from qcompiler.search.budget import Budget
from qcompiler.search.choose import Problem, problem
from qcompiler.search.chooser import Chooser, dominated, figures_of, front
from qcompiler.search.forms import UNIFORM
from qcompiler.search.layers import Assignment, Layer, everywhere, junctions_of, layers_of, request
from qcompiler.search.measure import Measured
from qcompiler.search.pricing import Cost, Prices, exact, price
from qcompiler.search.results import Chosen, Correlation, FormatRow, LayerRow, Point, Search
from qcompiler.search.sensitivity import Sensitivities, format_plans, sensitivities
from qcompiler.search.workshop import Workshop, open_judges
from qcompiler.target_loader import load_target

FEWEST_POINTS = 4
"""For a rank correlation."""
ATTEMPTS = 3
"""Choices that are repaired and measured, at most, until one keeps the budget."""
ANYTHING = Budget()


@dataclass(frozen=True)
class Found:
    """A search, and the options that compile what it chose."""

    search: Search
    options: Options


def search(
    model: str | os.PathLike[str],
    target: str | os.PathLike[str] = "arm-npu",
    options: Options = DEFAULTS,
    budget: Budget = ANYTHING,
    *,
    evaluation: CalibrationSource | None = None,
    labels: str | os.PathLike[str] | None = None,
    sweep: bool = True,
    progress: Progress = SILENT,
) -> Found:
    """Choose a format for each layer.

    Args:
        model: the .onnx file, float.
        target: a bundled target's name, or a YAML spec; says which formats there are and what they cost.
        options: with calibration data, an .npz of which may hold labels; formats of weights in it are not heeded.
        budget: limits, and what to minimise.
        evaluation: other samples, on which points are run for the figures shown; nothing is chosen by them. Calibration
            data stand in for them.
        labels: of the samples of `evaluation`; without it, an array called label or labels in its .npz.
        sweep: also find and run the points of the front; else just what was chosen, and 8 bits everywhere.
        progress: told of stages as they begin.

    Raises:
        QCompilerError: anything wrong with what was given, or a budget that cannot be kept; the message says what can.
    """
    if options.calibration is None:
        raise QCompilerError("search measures layers on real samples: give --calibration.")
    if options.formats.activations not in ("int8", "int16"):
        raise QCompilerError(
            "search prices layers with activations of fixed ranges: it takes --activations int8 or int16. Formats of "
            "others are chosen by --layer-weights."
        )
    base = WeightRequest(activations=options.formats.activations, group=options.formats.group)
    chip = load_target(target, options.overrides)
    widened = base.activations == "int8" and "int16" in chip.quantization.activations.dtypes
    prepared = prepare(model, target, replace(options, formats=replace(base, group=None)), progress, learn=False,
                       widths=("int8", "int16") if widened else ())  # fmt: skip
    if prepared.plan is None or prepared.ranges is None:
        raise QCompilerError(f"{prepared.source} arrived quantized, so its formats stand; give the float model.")
    layers = layers_of(prepared.graph, prepared.plan, prepared.target, base)
    if not any(layer.weights for layer in layers):
        raise QCompilerError(f"{prepared.source} has no quantized layer with weights, so there is nothing to choose.")
    judges = open_judges(prepared, options, evaluation, labels)
    junctions = junctions_of(prepared.graph, prepared.plan, layers)
    plans = format_plans(prepared, layers, base, options.keep_float, options.quality, progress)
    shop = Workshop(prepared, options, base, layers, plans, judges)
    prices = price(layers, junctions, shop.place, progress)
    felt = sensitivities(prepared, layers, plans, base, options.keep_float, judges.calibration, prices.macs, progress)
    table = problem(layers, junctions, felt, prices)
    wanted, final_options, cost, measured = _chosen(model, target, options, table, shop, budget, progress)
    others = front(table) if sweep else [everywhere(layers, UNIFORM)]
    points = _points(list(dict.fromkeys((*others, wanted))), table, shop, progress)
    found = Search(
        model=prepared.source.name,
        target=prepared.target.name,
        budget=budget,
        activations=activation_dtype(prepared.target, base),
        quality=options.quality,
        sensitivity_samples=felt.samples,
        evaluated=evaluation is not None,
        base_noise=felt.base,
        layers=tuple(_layer_row(layer, felt, prices) for layer in layers),
        points=points,
        correlations=_correlations(points),
        chosen=Chosen(
            next(point.name for point in points if point.formats == wanted),
            {layer.name: dtype for layer, dtype in zip(layers, wanted, strict=True) if dtype != UNIFORM},
            cost,
            measured,
        ),
    )
    return Found(found, final_options)


def _layer_row(layer: Layer, felt: Sensitivities, prices: Prices) -> LayerRow:
    rows: list[FormatRow] = []
    for dtype in layer.formats:
        cost = prices.by_layer[layer.name, dtype]
        noise = felt.by_layer[layer.name, dtype]
        rows.append(FormatRow(dtype, noise, cost.latency, cost.energy, cost.weights))
    return LayerRow(layer.name, layer.op, tuple(rows))


def _points(choices: Sequence[Assignment], table: Problem, shop: Workshop, progress: Progress) -> tuple[Point, ...]:
    """Run and estimate every choice whole; the slowest first."""
    progress.stage("measure points")
    measured = shop.verified(choices, progress)
    predicted = [table.add_up(chosen) for chosen in choices]
    costs = [shop.cost(chosen) for chosen in choices]
    figures = [figures_of(sums["noise"], cost) for sums, cost in zip(predicted, costs, strict=True)]
    order = sorted(range(len(choices)), key=lambda index: (-costs[index].latency, -costs[index].weights))
    found: list[Point] = []
    for rank, index in enumerate(order, start=1):
        sums = predicted[index]
        found.append(
            Point(
                name="int8" if set(choices[index]) == {UNIFORM} else str(rank),
                formats=choices[index],
                predicted_noise=sums["noise"],
                predicted=Cost(sums["latency"], sums["energy"], sums["weights"]),
                cost=costs[index],
                measured=measured[index],
                on_front=not dominated(figures[index], figures),
            )
        )
    return tuple(found)


def _options(options: Options, layers: Sequence[Layer], chosen: Assignment, base: WeightRequest) -> Options:
    """What compiles this choice."""
    wanted = request(layers, chosen, base)
    return replace(
        options,
        formats=wanted.formats,
        keep_float=(*options.keep_float, *wanted.floats),
        half={**options.half, **wanted.halves},
    )


def _chosen(
    model: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: Options,
    table: Problem,
    shop: Workshop,
    budget: Budget,
    progress: Progress,
) -> tuple[Assignment, Options, Cost, Measured]:
    """Choose, and quantize the choice just as `compile` would; its options, cost and measurements.

    Repairing layers one after the other usually makes a model better than repairing each by itself, which the choice
    was made by, but not always. If it then loses more than is allowed, a choice that loses less is tried.
    """
    limit, allowed, attempts = budget, budget.drop, 0
    while True:
        attempts += 1
        progress.stage("choose")
        wanted = Chooser(table, shop, limit).choose()
        final = _options(options, shop.layers, wanted, shop.base)
        placed = place_prepared(prepare(model, target, final, progress), progress)
        models = [partial(_quantized, placed)]
        progress.stage("verify")
        loss = shop.judges.judge(models)[0].loss
        within = allowed is None or loss <= allowed
        stricter = limit if within else replace(limit, max_drop=(limit.drop or 0.0) * min(0.8, (allowed or 0.0) / loss))
        if within or attempts == ATTEMPTS or not Chooser(table, shop, stricter).can_keep():
            return wanted, final, exact(placed), shop.judges.verify(models)[0]
        limit = stricter


def _quantized(placed: Placed) -> ir.Model:
    return placed.quantized


def _correlations(points: Sequence[Point]) -> tuple[Correlation, ...]:
    """Spearman's rho of predicted noise with everything measured that gets worse as it grows."""
    series: dict[str, list[float | None]] = {
        "noise": [point.measured.noise for point in points],
        "expected loss of top-1": [point.measured.expected_drop for point in points],
        "disagreement": [_less(point.measured.agreement) for point in points],
        "loss of top-1": [point.measured.drop for point in points],
    }
    predicted = [point.predicted_noise for point in points]
    found: list[Correlation] = []
    for name, values in series.items():
        known = [value for value in values if value is not None]
        if len(known) == len(points) >= FEWEST_POINTS and len(set(known)) > 1:
            rho = float(np.corrcoef(rankdata(predicted), rankdata(known))[0, 1])
            if math.isfinite(rho):
                found.append(Correlation(name, rho, len(points)))
    return tuple(found)


def _less(share: float | None) -> float | None:
    return None if share is None else 1 - share
