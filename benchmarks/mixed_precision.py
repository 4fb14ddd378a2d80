"""Mixed precision: formats chosen by `qcompile search` beside INT8 everywhere, on labelled data not searched on.

    python benchmarks/mixed_precision.py [--target systolic-npu] [--max-drop 1%] [--quality balanced] [--only A,B]
        [--zoo DIR]

The samples of each classifier are shuffled once and dealt into folds. Each fold searches and calibrates on one part and
is evaluated on the others; small data sets change roles, so that every image is evaluated once. Points of the front are
run on the evaluation data too, which gives the rank correlation of what was predicted and what was measured. Writes
results/mixed-precision.md if no model was left out. Exits with 1 if weights or latency are not below INT8's.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from accuracy import DEFAULT_ZOO, RESULTS, Arrays, Model, _load_evaluation, _models
from rich.console import Console

from qcompiler.options import Options
from qcompiler.quant.types import Quality
from qcompiler.report import byte_count, quantity
from qcompiler.search.budget import parse_budget
from qcompiler.search.measure import Measured
from qcompiler.search.results import Search, mixture
from qcompiler.search.search import search

MODELS = "mobilenet_v1_025_128,resnet20_cifar10"
CALIBRATION_SAMPLES = 128
SEED = 0


@dataclass(frozen=True)
class Row:
    """One model; costs are means over folds."""

    model: str
    searches: tuple[Search, ...]
    seconds: float

    def pooled(self, kind: str) -> tuple[float, float, int]:
        """Loss of top-1 over all folds' evaluation samples in points, its standard error, and how many samples.

        Args:
            kind: "chosen" or "int8".
        """
        seen = [result.chosen.measured if kind == "chosen" else result.point("int8").measured
                for result in self.searches]  # fmt: skip
        count = sum(each.samples for each in seen)
        drop = sum(_known(each.drop) * each.samples for each in seen) / count
        variance = sum((_known(each.drop_error) * each.samples) ** 2 for each in seen) / count**2
        return 100 * drop, 100 * variance**0.5, count

    def top1(self, kind: str) -> float:
        """Of "float", "int8" or "chosen", in percent."""
        seen: list[Measured] = [result.chosen.measured if kind == "chosen" else result.point("int8").measured
                                for result in self.searches]  # fmt: skip
        count = sum(each.samples for each in seen)
        hits = sum(
            (_known(each.top1) + (_known(each.drop) if kind == "float" else 0.0)) * each.samples for each in seen
        )
        return 100 * hits / count

    def costs(self, kind: str) -> tuple[float, float, float]:
        """Seconds, joules, bytes."""
        costs = [result.chosen.cost if kind == "chosen" else result.point("int8").cost for result in self.searches]
        return tuple(np.mean([(cost.latency, cost.energy, cost.weights) for cost in costs], axis=0))


def main(
    target: Annotated[str, typer.Option(help="a bundled target's name, or a spec")] = "systolic-npu",
    max_drop: Annotated[str, typer.Option(help="accuracy that may be lost")] = "1%",
    quality: Annotated[Quality, typer.Option(help="how long to repair")] = "balanced",
    only: Annotated[str, typer.Option(help="models, by comma")] = MODELS,
    zoo: Annotated[Path, typer.Option(help="folder of models and data")] = DEFAULT_ZOO,
) -> None:
    """Search, evaluate, print, write."""
    evaluation, rows = _load_evaluation(zoo), list[Row]()
    console = Console(width=160)
    known = {model.name: model for model in _models(zoo)}
    for name in only.split(","):
        model = known[name]
        start = time.perf_counter()
        inputs, labels = _samples(model, evaluation.evaluate, zoo)
        searches: list[Search] = []
        for calibration, others in _folds(len(labels)):
            found = search(
                model.path,
                target,
                Options(calibration=_part(inputs, labels, calibration), quality=quality),
                parse_budget(max_drop, None, None, None, None),
                evaluation=_part(inputs, labels, others),
            )
            searches.append(found.search)
            ranks = ", ".join(f"{item.measure} {item.spearman:.2f}" for item in found.search.correlations)
            chosen = found.search.chosen
            console.print(
                f"{name}: {mixture(found.search.point(chosen.name).formats)}; loss {_known(chosen.measured.drop):.2%} "
                f"of {chosen.measured.samples}; Spearman over {len(found.search.points)} points: {ranks}"
            )
        rows.append(Row(name, tuple(searches), time.perf_counter() - start))
    text = _markdown(rows, target, max_drop, quality)
    console.print(text, markup=False)
    if only == MODELS:
        (RESULTS / "mixed-precision.md").write_text(text)
    below = all(row.costs("chosen")[index] < row.costs("int8")[index] for row in rows for index in (0, 2))
    sys.exit(0 if below else 1)


def _samples(model: Model, evaluate: object, zoo: Path) -> tuple[Arrays, np.ndarray]:
    """All inputs as the zoo preprocesses them, and the class of each as the model numbers them."""
    fed: list[Arrays] = []

    def recorded(inputs: Arrays) -> list[np.ndarray]:
        fed.append(inputs)
        return [np.zeros((1, 2000))]

    assert callable(evaluate)
    evaluate(model.entry, recorded, None)
    with np.load(zoo / str(model.entry["data"])) as data:
        labels = data["labels"]
    chosen = model.entry.get("slice")
    if isinstance(chosen, list):
        labels = labels[slice(*chosen)]
    offset = model.entry.get("label_offset", 0)
    assert isinstance(offset, int)
    inputs = {name: np.concatenate([each[name] for each in fed]) for name in fed[0]}
    return inputs, labels[: len(fed)].astype(np.int64) + offset


def _folds(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Indices to search on and to evaluate on: both halves of few samples in turn, else the first of many."""
    order = np.random.default_rng(SEED).permutation(count)
    if count >= 4 * CALIBRATION_SAMPLES:
        return [(order[:CALIBRATION_SAMPLES], order[CALIBRATION_SAMPLES:])]
    halves = np.array_split(order, 2)
    return [(halves[0], halves[1]), (halves[1], halves[0])]


def _part(inputs: Arrays, labels: np.ndarray, indices: np.ndarray) -> dict[str, np.ndarray]:
    return {**{name: array[indices] for name, array in inputs.items()}, "labels": labels[indices]}


def _known(value: float | None) -> float:
    assert value is not None, "every sample has a label"
    return value


def _markdown(rows: Sequence[Row], target: str, max_drop: str, quality: Quality) -> str:
    lines = [
        f"# Mixed precision on {target}, a loss of at most {max_drop}",
        "",
        f"Made by `benchmarks/mixed_precision.py --target {target} --max-drop {max_drop} --quality {quality}`: formats "
        "chosen by `qcompile search` on calibration data, evaluated on other samples. Loss: top-1 of the float model "
        "less that of the quantized one, in points, with its standard error. Costs are estimates of the target's cost "
        "model, means over folds.",
        "",
        "| model | formats | top-1 | lost | evaluated on | latency | energy | weights |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(f"| {row.model} | float | {row.top1('float'):.2f} | | {row.pooled('int8')[2]} | | | |")
        eight = row.costs("int8")
        for kind in ("int8", "chosen"):
            lost, error, count = row.pooled(kind)
            cost = row.costs(kind)
            ratios = [
                f" ({ours / theirs:.2f}×)" if kind == "chosen" else "" for ours, theirs in zip(cost, eight, strict=True)
            ]
            shown = (quantity(cost[0], "s"), quantity(cost[1], "J"), byte_count(round(cost[2])))
            cells = " | ".join(text + ratio for text, ratio in zip(shown, ratios, strict=True))
            name = "int8" if kind == "int8" else "mixed"
            lines.append(
                f"| {row.model} | {name} | {row.top1(kind):.2f} | {lost:+.2f} ± {error:.2f} | {count} | {cells} |"
            )
    lines += [
        "",
        "Spearman's rank correlation over the points of each search, of the noise the integer program predicted "
        "(layers added up, measured one at a time on calibration data) with what the whole models had on evaluation "
        "data. The loss of top-1 is counted in whole images, so that points that differ by less than its error are in "
        "any order; the loss the float model's own probabilities expect is finer.",
        "",
        "| model | chosen | points | noise | disagreement | expected loss of top-1 | loss of top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for result in row.searches:
            rho = {item.measure: f"{item.spearman:.2f}" for item in result.correlations}
            cells = [rho.get(name, "") for name in ("noise", "disagreement", "expected loss of top-1", "loss of top-1")]
            formats = mixture(result.point(result.chosen.name).formats)
            lines.append(f"| {row.model} | {formats} | {len(result.points)} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    typer.run(main)
