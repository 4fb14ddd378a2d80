"""What pruning costs in accuracy and saves in weights and cycles, on accelerators that gain from zeros.

    python benchmarks/sparsity.py [--only NAME] [--zoo DIR] [--quality balanced] [--prunings none,0.5,2:4]

Accuracy is that of the quantized graph in onnxruntime, over all labelled data but the samples calibrated on. Size is
that of the weights as the accelerator stores them, cycles what one inference takes there by our cost model:
ethos-u55-128 and ethos-u65-256 compress weights, so that zeros make them shorter; ethos-u85-256 besides skips two zeros
of every four. Writes results/sparsity.md if no model was left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import onnx_ir as ir
import typer
from accuracy import (
    DEFAULT_ZOO,
    METRIC_OF_TASK,
    RESULTS,
    Model,
    Runner,
    _load_evaluation,
    _models,
    _session,
    held_out,
    recorded,
)
from rich.console import Console

from qcompiler.backends.npu import NpuProgram
from qcompiler.compile import estimate, place, schedule
from qcompiler.options import Options
from qcompiler.quant.prune import parse
from qcompiler.quant.types import Quality

MODELS = ("resnet20_cifar10", "mobilenet_v1_025_128", "kws_dscnn")
TARGETS = ("ethos-u55-128", "ethos-u65-256", "ethos-u85-256")


@dataclass(frozen=True)
class Row:
    model: str
    pruning: str
    metric: float
    lost: float
    """Points, of the float model's metric."""
    kib: tuple[float, ...]
    """Of weights, by target."""
    cycles: tuple[float, ...]

    def cells(self, first: "Row") -> list[str]:
        sizes = [f"{own:.1f} ({own / dense - 1:+.0%})" for own, dense in zip(self.kib, first.kib, strict=True)]
        times = [f"{own:,.0f} ({own / dense - 1:+.0%})" for own, dense in zip(self.cycles, first.cycles, strict=True)]
        return [self.model, self.pruning, f"{self.metric:.4f}", f"{self.lost:+.2f}", *sizes, *times]


HEADER = (
    "model", "zeros", "metric", "points lost", *(f"KiB, {name}" for name in TARGETS),
    *(f"cycles, {name}" for name in TARGETS),
)  # fmt: skip


def main(
    only: Annotated[str, typer.Option(help="models whose name contains this")] = "",
    zoo: Annotated[Path, typer.Option(help="folder of models and data")] = DEFAULT_ZOO,
    quality: Annotated[Quality, typer.Option(help="how long to repair quantized models")] = "balanced",
    prunings: Annotated[str, typer.Option(help="none, and what --prune takes, by comma")] = "none,0.5,0.7,2:4",
) -> None:
    """Prune, quantize, evaluate, print, write."""
    console, evaluation = Console(width=200), _load_evaluation(zoo)
    lines: list[str] = []
    for model in _models(zoo):
        if model.name not in MODELS or only not in model.name:
            continue
        fed, float_run = recorded(model, evaluation)
        with TemporaryDirectory() as folder:
            entry, calibration = held_out(model, fed, Path(folder))

            def score(run: Runner, entry=entry, metric=METRIC_OF_TASK[model.task]) -> float:
                return float(evaluation.evaluate(entry, run)[metric])

            original, first = score(float_run), None
            for pruning in prunings.split(","):
                row = _measure(model, pruning, quality, calibration, original, score)
                first = first or row
                lines.append("| " + " | ".join(row.cells(first)) + " |")
                console.print(lines[-1])
    text = "\n".join(
        [
            "# Pruning: accuracy, size and cycles",
            "",
            f"8 bits, quality {quality}, calibrated on samples that are not evaluated. In brackets the change against "
            "the dense model. Made by `benchmarks/sparsity.py" + f" --quality {quality} --prunings {prunings}`.",
            "",
            "| " + " | ".join(HEADER) + " |",
            "|" + "---|" * len(HEADER),
            *lines,
            "",
        ]
    )
    if not only:
        (RESULTS / "sparsity.md").write_text(text)


def _measure(
    model: Model,
    pruning: str,
    quality: Quality,
    calibration: dict[str, np.ndarray],
    original: float,
    score: Callable[[Runner], float],
) -> Row:
    request = None if pruning == "none" else parse(pruning)
    options = Options(calibration=calibration, quality=quality, prune=request)
    sizes, cycles = list[float](), list[float]()
    with TemporaryDirectory() as folder:
        learned = place(model.path, TARGETS[0], options)
        found = score(_session(ir.to_proto(learned.quantized).SerializeToString(), optimize=False))
        quantized = Path(folder) / "quantized.onnx"
        ir.save(learned.quantized, quantized)
        for target in TARGETS:  # which all take the same formats
            placed = place(quantized, target)
            sizes.append(sum(map(stored_weights, schedule(placed).values())) / 1024)
            cycles.append(estimate(placed)[0].totals.npu_cycles)
    return Row(model.name, pruning, found, 100 * (original - found), tuple(sizes), tuple(cycles))


def stored_weights(program: NpuProgram) -> float:
    """Bytes of weights as they lie in memory."""
    return sum((span.end - span.start) * span.ratio for span in program.encoded)


if __name__ == "__main__":
    typer.run(main)
