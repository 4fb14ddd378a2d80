"""Accuracy of compiled models beside their float originals, over all labelled data of the model zoo.

    python benchmarks/accuracy.py --target arm-npu [--only NAME] [--limit N] [--zoo DIR] [--executor bundle|ort]
        [--format w8a8,w4a8,w4a8g32,w8a16,dynamic,…] [--quality fast|balanced|best]

`bundle` compiles each model and runs the bundle; `ort` stops at the QDQ graph and runs that in onnxruntime, which
tells errors of quantization from errors of code generation. Float models are calibrated on 64 samples of their data;
dynamic quantization sees none. The face detector, whose metric needs no labels, is evaluated on images of other data
too (`faces.py`), which it is never calibrated on. What weights of 4 bits and less learn from is not evaluated, and
rounding them to the nearest (--quality fast) is measured beside. Exits with 1 if a model misses its goal (`goal`); a
model that arrives quantized must stay within 0.3 points of itself in onnxruntime.
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
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Annotated

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import typer
from faces import with_more_faces
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
    learnable: int | None = None
    """Only the first so many samples may be calibrated on; None: all."""


class Format(StrEnum):
    """Bits of weights and activations."""

    W8A8 = "w8a8"
    W8A16 = "w8a16"
    W4A8 = "w4a8"
    W4A16 = "w4a16"
    W4A8_GROUPS = "w4a8g32"
    W2A8 = "w2a8"
    W1A8 = "w1a8"
    DYNAMIC = "dynamic"

    @property
    def weights(self) -> WeightType:
        by_bits: dict[str, WeightType] = {"4": "int4", "2": "int2", "1": "binary"}
        return "int8" if self is Format.DYNAMIC else by_bits.get(self.value[1], "int8")

    @property
    def activations(self) -> ActivationType:
        return "dynamic" if self is Format.DYNAMIC else "int16" if self.value.endswith("a16") else "int8"

    @property
    def group(self) -> int | None:
        """How many weights share a scale."""
        return 32 if self is Format.W4A8_GROUPS else None

    @property
    def holds_out(self) -> bool:
        """Whether so much is learned from calibration data that it must not be evaluated on."""
        return self.weights != "int8"


POINTS_W4 = {"resnet20_cifar10": 2.0, "squeezenet11": 2.0, "mobilenet_v1_025_128": 4.0, "kws_dscnn": 4.0}
DYNAMIC_GOALS = ("kws_dscnn", "resnet20_cifar10", "ad01_autoencoder")


def goal(model: Model, form: Format) -> float | None:
    """Points of the metric a model may lose, or percent of reconstruction error it may gain; None: no goal is set."""
    if model.quantized:
        return 0.3
    match form:
        case Format.W8A8:
            return 0.5 if model.task == "cls" else 1.0
        case Format.W8A16:
            return 0.1
        case Format.W4A8 | Format.W4A16 | Format.W4A8_GROUPS:
            return POINTS_W4.get(model.name)
        case Format.DYNAMIC:
            return 0.5 if model.name in DYNAMIC_GOALS else None
        case _:
            return None


@dataclass(frozen=True)
class Row:
    model: Model
    form: Format
    samples: int
    original: float
    compiled: float
    plain: float | None
    """With --quality fast, where that is measured beside."""
    compile_seconds: float
    run_seconds: float

    @property
    def lost(self) -> float:
        return self._lost(self.compiled)

    def _lost(self, metric: float) -> float:
        """Points lost, or percent of reconstruction error gained."""
        if self.model.task == "recon":
            return 100 * (metric / self.original - 1)
        return 100 * (self.original - metric)

    @property
    def reached(self) -> bool:
        allowed = goal(self.model, self.form)
        # A model that arrives quantized is to be reproduced: being better by chance is as wrong as being worse.
        lost = abs(self.lost) if self.model.quantized else self.lost
        return allowed is None or lost <= allowed + 1e-9

    def cells(self) -> tuple[str, ...]:
        unit = "%" if self.model.task == "recon" else "points"
        allowed = goal(self.model, self.form)
        return (
            self.model.name,
            "quantized" if self.model.quantized else "float",
            METRIC_OF_TASK[self.model.task],
            str(self.samples),
            f"{self.original:.4f}",
            f"{self.compiled:.4f}",
            f"{self.lost:+.2f} {unit}",
            "" if self.plain is None else f"{self._lost(self.plain):+.2f} {unit}",
            "" if allowed is None else f"{allowed} {unit}",
            "" if allowed is None else "yes" if self.reached else "NO",
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
    "lost by plain rounding",
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
    form: Annotated[str, typer.Option("--format", help="of weights and activations; several by comma")] = "w8a8",
    quality: Annotated[Quality, typer.Option(help="how long to repair quantized models")] = "fast",
) -> None:
    """Compile and evaluate every model of the zoo; print a table, and write it if nothing was left out."""
    evaluation = _load_evaluation(zoo)
    console, missed = Console(), False
    if not console.is_terminal:
        console.width = WIDTH
    for name in form.split(","):
        chosen, rows = Format(name), list[Row]()
        for model in _models(zoo):
            if only in model.name and (chosen is Format.W8A8 or not model.quantized):
                rows.append(_measure(model, target, executor, chosen, quality, evaluation, limit or None))
                row = rows[-1]
                mark = "ok" if row.reached else "MISSED"
                console.print(f"{model.name}: {row.original:.4f} -> {row.compiled:.4f} ({mark})", highlight=False)
        table = Table(*HEADER, title=f"{target}, {executor}, {chosen}, {quality}")
        for row in rows:
            table.add_row(*row.cells())
        console.print(table)
        missed = missed or not all(row.reached for row in rows)
        if not only and not limit:
            RESULTS.mkdir(exist_ok=True)
            suffix = "".join(f"-{part}" for part in (chosen, quality) if part not in (Format.W8A8, "fast"))
            path = RESULTS / f"accuracy-{Path(target).stem}-{executor}{suffix}.md"
            path.write_text(_markdown(rows, target, executor, chosen, quality))
            console.print(f"written to {path}")
    sys.exit(1 if missed else 0)


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
    model: Model,
    target: str,
    executor: Executor,
    form: Format,
    quality: Quality,
    evaluation: ModuleType,
    limit: int | None,
) -> Row:
    with TemporaryDirectory() as folder:
        if limit is None:
            model = with_more_faces(model, _session(model.path.read_bytes()), evaluation, Path(folder))
        fed, original_run = recorded(model, evaluation, limit)
        entry, calibration = model.entry, None if model.quantized else _calibration(fed[: model.learnable])
        if form.holds_out:
            entry, calibration = held_out(model, fed, Path(folder))
        original = evaluation.evaluate(entry, original_run, limit)
        make = _compiled if executor is Executor.BUNDLE else _quantized
        start = time.perf_counter()
        run = make(model, target, None if form is Format.DYNAMIC else calibration, form, quality)
        compiled_at = time.perf_counter()
        compiled = evaluation.evaluate(entry, run, limit)
        done = time.perf_counter()
        metric, plain = METRIC_OF_TASK[model.task], None
        if form.holds_out and quality != "fast":
            plain = float(evaluation.evaluate(entry, make(model, target, calibration, form, "fast"), limit)[metric])
    return Row(
        model,
        form,
        int(original["n"]),
        float(original[metric]),
        float(compiled[metric]),
        plain,
        compiled_at - start,
        done - compiled_at,
    )


def recorded(model: Model, evaluation: ModuleType, limit: int | None = None) -> tuple[list[Arrays], Runner]:
    """What the evaluation feeds a model, sample by sample, and the model in onnxruntime."""
    run, fed = _session(model.path.read_bytes()), list[Arrays]()

    def record(inputs: Arrays) -> list[np.ndarray]:
        fed.append(inputs)
        return run(inputs)

    evaluation.evaluate(model.entry, record, limit)
    return fed, run


def _calibration(fed: Sequence[Arrays]) -> dict[str, np.ndarray]:
    """Of the inputs the evaluation feeds, some spread evenly over all, since data sets are often sorted by class."""
    return _stacked(fed, _spread(len(fed), CALIBRATION_SAMPLES))


def _spread(count: int, wanted: int) -> np.ndarray:
    return np.linspace(0, count - 1, min(wanted, count)).round().astype(int)


def _stacked(fed: Sequence[Arrays], indices: np.ndarray) -> dict[str, np.ndarray]:
    return {name: np.concatenate([fed[index][name] for index in indices]) for name in fed[0]}


_RAGGED = {"det": ("boxes", "box_offsets"), "face": ("ref_boxes", "ref_offsets")}
"""Arrays with several rows a sample, and where each sample's begin."""


def held_out(
    model: Model, fed: Sequence[Arrays], folder: Path, chosen: np.ndarray | None = None
) -> tuple[Mapping[str, object], dict[str, np.ndarray]]:
    """An entry of the manifest whose data, written to `folder`, lacks the samples to calibrate on; and those samples.

    Without their indices, half of what may be is calibrated on, at most `CALIBRATION_SAMPLES`.
    """
    if chosen is None:
        count = model.learnable or len(fed)
        chosen = _spread(count, min(CALIBRATION_SAMPLES, count // 2))
    entry = dict(model.entry)
    with np.load(model.path.parents[1] / str(entry["data"])) as stored:
        arrays = {name: stored[name] for name in stored.files}
    key = {"cls": str(entry.get("x_key", "images")), "recon": "frames"}.get(model.task, "images")
    bounds = entry.pop("slice", None)
    part = slice(*bounds) if isinstance(bounds, list) else slice(None)
    kept = np.delete(np.arange(len(arrays[key]))[part], chosen)
    if model.task in _RAGGED:
        rows, offsets = _RAGGED[model.task]
        pieces = [arrays[rows][slice(*arrays[offsets][index : index + 2])] for index in kept]
        arrays[rows], arrays[offsets] = np.concatenate(pieces), np.cumsum([0, *map(len, pieces)])
    for name in (key, "labels"):
        if name in arrays:
            arrays[name] = arrays[name][kept]
    np.savez(folder / "held_out.npz", **arrays)  # pyright: ignore[reportArgumentType]
    entry["data"] = str(folder / "held_out.npz")
    return entry, _stacked(fed, chosen)


def _compiled(
    model: Model, target: str, calibration: dict[str, np.ndarray] | None, form: Format, quality: Quality
) -> Runner:
    bundle = qcompiler.compile(
        model.path,
        target=target,
        calibration=calibration,
        weights=form.weights,
        group=form.group,
        activations=form.activations,
        quality=quality,
    )

    def run(inputs: Arrays) -> list[np.ndarray]:
        return list(bundle.run(dict(inputs)).values())

    return run


def _quantized(
    model: Model, target: str, calibration: dict[str, np.ndarray] | None, form: Format, quality: Quality
) -> Runner:
    """The QDQ graph that `compile` would lower, in onnxruntime without its own rewrites."""
    from qcompiler.compile import place
    from qcompiler.options import Options
    from qcompiler.quant.types import WeightRequest

    request = WeightRequest(form.weights, {}, form.activations, group=form.group)
    options = Options(calibration=calibration, formats=request, quality=quality)
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


def _markdown(rows: list[Row], target: str, executor: Executor, form: Format, quality: Quality) -> str:
    what = "the compiled bundle" if executor is Executor.BUNDLE else "the QDQ graph in onnxruntime"
    on = f"calibrated on {CALIBRATION_SAMPLES} samples spread evenly over the data"
    if form is Format.DYNAMIC:
        on = "not calibrated"
    elif form.holds_out:
        on = f"calibrated on {CALIBRATION_SAMPLES} samples (half of smaller sets) that are not evaluated"
    classifiers = [row.lost for row in rows if row.model.task == "cls" and not row.model.quantized]
    lines = [
        f"# Accuracy on {target}, {what}, {form}, quality {quality}",
        "",
        f"Float models {on}. The face detector's metric is agreement with its float model, "
        "measured on images of the other data sets too, which it is not calibrated on. Made by "
        f"`benchmarks/accuracy.py --target {target} --executor {executor} --format {form} --quality {quality}`.",
        "",
        "| " + " | ".join(HEADER[:-2]) + " |",
        "|" + "---|" * len(HEADER[:-2]),
        *("| " + " | ".join(row.cells()[:-2]) + " |" for row in rows),
        "",
        f"Mean over float classifiers: {np.mean(classifiers):+.2f} points lost.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
