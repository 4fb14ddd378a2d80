"""Accuracy of compiled models beside their float originals, over all labelled data of the model zoo.

    python benchmarks/accuracy.py --target arm-npu [--only NAME] [--limit N] [--zoo DIR] [--executor bundle|ort]
        [--weights int8|int4] [--activations int8|int16] [--quality fast|balanced|best]

`bundle` compiles each model and runs the bundle; `ort` stops at the QDQ graph and runs that in onnxruntime, which
tells errors of quantization from errors of code generation. Float models are calibrated on the first 64 samples of
their data. Exits with 1 if a model misses its goal: a float model may lose 1.0 point (3% of reconstruction error), a
model that arrives quantized must stay within 0.3 points of itself in onnxruntime. Other formats are measured on
float models only; with 4-bit weights they may lose 4 points.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Annotated

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import typer
from rich.console import Console
from rich.table import Table

import qcompiler
from qcompiler.quant.types import ActivationType, Quality, WeightType

CALIBRATION_SAMPLES = 64
METRIC_OF_TASK = {"cls": "top1", "det": "mAP50", "face": "F1_vs_fp32", "recon": "recon_mse"}
WIDTH = 160
"""Columns of the printed table where there is no terminal to say."""
RESULTS = Path(__file__).parent / "results"
DEFAULT_ZOO = Path(os.environ.get("QCOMPILER_ZOO", Path(__file__).resolve().parents[2] / "shared" / "zoo"))

Arrays = Mapping[str, np.ndarray]
Runner = Callable[[Arrays], list[np.ndarray]]


class Executor(StrEnum):
    BUNDLE = "bundle"
    ORT = "ort"


@dataclass(frozen=True)
class Model:
    """An entry of the zoo's manifest."""

    name: str
    path: Path
    task: str
    quantized: bool
    entry: Mapping[str, object]
    """The entry itself, for the zoo's own `evaluate`."""


@dataclass(frozen=True)
class Formats:
    """How models are quantized."""

    weights: WeightType
    activations: ActivationType
    quality: Quality

    @property
    def is_default(self) -> bool:
        return self.weights == self.activations == "int8"

    @property
    def suffix(self) -> str:
        """Of file names: what differs from the defaults."""
        parts = ["w4" if self.weights == "int4" else "", "a16" if self.activations == "int16" else "", self.quality]
        return "".join(f"-{part}" for part in parts if part and part != "fast")

    @property
    def options(self) -> str:
        return f"--weights {self.weights} --activations {self.activations} --quality {self.quality}"


@dataclass(frozen=True)
class Row:
    model: Model
    samples: int
    original: float
    compiled: float
    compile_seconds: float
    run_seconds: float
    formats: Formats

    @property
    def lost(self) -> float:
        """Points lost, or percent of reconstruction error gained."""
        if self.model.task == "recon":
            return 100 * (self.compiled / self.original - 1)
        return 100 * (self.original - self.compiled)

    @property
    def allowed(self) -> float:
        if self.model.quantized:
            return 0.3
        if self.formats.weights == "int4":
            return 4.0
        return 3.0 if self.model.task == "recon" else 1.0

    @property
    def reached(self) -> bool:
        # A model that arrives quantized is to be reproduced: being better by chance is as wrong as being worse.
        lost = abs(self.lost) if self.model.quantized else self.lost
        return lost <= self.allowed + 1e-9

    def cells(self) -> tuple[str, ...]:
        unit = "%" if self.model.task == "recon" else "points"
        return (
            self.model.name,
            "quantized" if self.model.quantized else "float",
            METRIC_OF_TASK[self.model.task],
            str(self.samples),
            f"{self.original:.4f}",
            f"{self.compiled:.4f}",
            f"{self.lost:+.2f} {unit}",
            f"{self.allowed} {unit}",
            "yes" if self.reached else "NO",
            f"{self.compile_seconds:.1f}",
            f"{self.run_seconds:.1f}",
        )


HEADER = (
    "model",
    "kind",
    "metric",
    "samples",
    "original",
    "compiled",
    "lost",
    "allowed",
    "reached",
    "compile s",
    "run s",
)


def main(
    target: Annotated[str, typer.Option(help="a bundled target's name, or a spec")] = "arm-npu",
    only: Annotated[str, typer.Option(help="models whose name contains this")] = "",
    limit: Annotated[int, typer.Option(help="use the first so many samples; 0 means all")] = 0,
    zoo: Annotated[Path, typer.Option(help="folder of models and data")] = DEFAULT_ZOO,
    executor: Annotated[Executor, typer.Option(help="what runs the compiled model")] = Executor.BUNDLE,
    weights: Annotated[WeightType, typer.Option(help="what weights are stored as")] = "int8",
    activations: Annotated[ActivationType, typer.Option(help="what activations are computed in")] = "int8",
    quality: Annotated[Quality, typer.Option(help="how long to repair quantized models")] = "fast",
) -> None:
    """Compile and evaluate every model of the zoo; print a table, and write it if nothing was left out."""
    evaluation, formats = _load_evaluation(zoo), Formats(weights, activations, quality)
    console, rows = Console(), list[Row]()
    if not console.is_terminal:
        console.width = WIDTH
    for model in _models(zoo):
        if only in model.name and (formats.is_default or not model.quantized):
            rows.append(_measure(model, target, executor, formats, evaluation, limit or None))
            row = rows[-1]
            mark = "ok" if row.reached else "MISSED"
            console.print(f"{model.name}: {row.original:.4f} -> {row.compiled:.4f} ({mark})", highlight=False)
    table = Table(*HEADER, title=f"{target}, {executor}, {formats.options}")
    for row in rows:
        table.add_row(*row.cells())
    console.print(table)
    if not only and not limit:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"accuracy-{Path(target).stem}-{executor}{formats.suffix}.md"
        path.write_text(_markdown(rows, target, executor, formats))
        console.print(f"written to {path}")
    sys.exit(0 if all(row.reached for row in rows) else 1)


def _models(zoo: Path) -> list[Model]:
    entries = json.loads((zoo / "manifest.json").read_text())["models"]
    return [
        Model(entry["name"], zoo / entry["model"], entry["task"], entry["kind"] != "fp32", entry)
        for entry in entries
        if entry.get("task") in METRIC_OF_TASK
    ]


def _load_evaluation(zoo: Path) -> ModuleType:
    """The zoo's own script, which defines every metric and preprocessing."""
    path = zoo / "eval_ref.py"
    spec = importlib.util.spec_from_file_location("eval_ref", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise typer.BadParameter(f"{zoo} holds no eval_ref.py; set --zoo or QCOMPILER_ZOO to the model zoo")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _measure(
    model: Model, target: str, executor: Executor, formats: Formats, evaluation: ModuleType, limit: int | None
) -> Row:
    original_run = _session(model.path.read_bytes())
    fed: list[Arrays] = []

    def recorded(inputs: Arrays) -> list[np.ndarray]:
        fed.append(inputs)
        return original_run(inputs)

    original = evaluation.evaluate(model.entry, recorded, limit)
    start = time.perf_counter()
    calibration = None if model.quantized else _calibration(fed)
    run = (_compiled if executor is Executor.BUNDLE else _quantized)(model, target, calibration, formats)
    compiled_at = time.perf_counter()
    compiled = evaluation.evaluate(model.entry, run, limit)
    metric = METRIC_OF_TASK[model.task]
    return Row(
        model,
        int(original["n"]),
        float(original[metric]),
        float(compiled[metric]),
        compiled_at - start,
        time.perf_counter() - compiled_at,
        formats,
    )


def _calibration(fed: Sequence[Arrays]) -> dict[str, np.ndarray]:
    """Of the inputs the evaluation feeds, some spread evenly over all, since data sets are often sorted by class."""
    spread = np.linspace(0, len(fed) - 1, min(CALIBRATION_SAMPLES, len(fed))).round().astype(int)
    return {name: np.concatenate([fed[index][name] for index in spread]) for name in fed[0]}


def _compiled(model: Model, target: str, calibration: dict[str, np.ndarray] | None, formats: Formats) -> Runner:
    bundle = qcompiler.compile(
        model.path,
        target=target,
        calibration=calibration,
        weights=formats.weights,
        activations=formats.activations,
        quality=formats.quality,
    )

    def run(inputs: Arrays) -> list[np.ndarray]:
        return list(bundle.run(dict(inputs)).values())

    return run


def _quantized(model: Model, target: str, calibration: dict[str, np.ndarray] | None, formats: Formats) -> Runner:
    """The QDQ graph that `compile` would lower, in onnxruntime without its own rewrites."""
    from qcompiler.compile import place
    from qcompiler.options import Options
    from qcompiler.quant.types import WeightRequest

    request = WeightRequest(formats.weights, {}, formats.activations)
    options = Options(calibration=calibration, formats=request, quality=formats.quality)
    placed = place(model.path, target, options)
    return _session(ir.to_proto(placed.quantized).SerializeToString(), optimize=False)


def _session(model: bytes, *, optimize: bool = True) -> Runner:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(inputs: Arrays) -> list[np.ndarray]:
        return [np.asarray(output) for output in session.run(None, dict(inputs))]

    return run


def _markdown(rows: list[Row], target: str, executor: Executor, formats: Formats) -> str:
    what = "the compiled bundle" if executor is Executor.BUNDLE else "the QDQ graph in onnxruntime"
    lines = [
        f"# Accuracy on {target}, {what}, weights {formats.weights}, activations {formats.activations}",
        "",
        f"Float models calibrated on {CALIBRATION_SAMPLES} samples spread evenly over the data. "
        f"Made by `benchmarks/accuracy.py --target {target} --executor {executor} {formats.options}`.",
        "",
        "| " + " | ".join(HEADER[:-2]) + " |",
        "|" + "---|" * len(HEADER[:-2]),
        *("| " + " | ".join(row.cells()[:-2]) + " |" for row in rows),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
