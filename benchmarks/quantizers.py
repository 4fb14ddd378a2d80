"""Accuracy after quantizing the zoo's float models: ours beside other quantizers, on the same calibration data.

    python benchmarks/quantizers.py [--weights int8|int4] [--qualities fast,balanced,best] [--only NAME]
        [--target systolic-npu] [--nncf PYTHON]

Every quantized model is run by onnxruntime without its graph rewrites, on all labelled data. Others, with 8-bit weights
only: onnxruntime's `quantize_static` as it comes but per channel where it can, and NNCF's `quantize` with its defaults
if --nncf names the Python of an environment that holds nncf, onnx and onnxruntime. Writes results/quantizers-w8a8.md or
-w4a8.md if no model was left out.
"""

import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import typer
from accuracy import (
    CALIBRATION_SAMPLES,
    DEFAULT_ZOO,
    METRIC_OF_TASK,
    RESULTS,
    Arrays,
    Model,
    Runner,
    _calibration,
    _load_evaluation,
    _models,
    _session,
)
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console

from qcompiler.calibrate import calibrate
from qcompiler.dataset import input_specs, load_dataset
from qcompiler.importer import import_onnx
from qcompiler.pipeline import SIMPLIFY, legalize, run_passes
from qcompiler.quant.plan import plan
from qcompiler.quant.quantize import quantize
from qcompiler.quant.repair import EFFORTS, repair
from qcompiler.quant.types import Quality, WeightRequest, WeightType
from qcompiler.target_loader import load_target

NNCF_SCRIPT = Path(__file__).parent / "nncf_quantize.py"
QUALITIES: tuple[Quality, ...] = ("fast", "balanced", "best")


@dataclass(frozen=True)
class Result:
    """One quantizer's model: its metric, and the seconds it took to make."""

    metric: float
    seconds: float


def main(
    weights: Annotated[WeightType, typer.Option(help="what our weights are stored as")] = "int8",
    qualities: Annotated[str, typer.Option(help="ours to measure, by comma")] = "fast,balanced",
    only: Annotated[str, typer.Option(help="models whose name contains one of these, by comma")] = "",
    target: Annotated[str, typer.Option(help="a bundled target's name, or a spec")] = "systolic-npu",
    zoo: Annotated[Path, typer.Option(help="folder of models and data")] = DEFAULT_ZOO,
    nncf: Annotated[Path | None, typer.Option(help="Python of an environment with NNCF")] = None,
) -> None:
    """Quantize, evaluate, print, write."""
    wanted: tuple[Quality, ...] = tuple(quality for quality in QUALITIES if quality in qualities.split(","))
    console, evaluation, text = Console(width=160), _load_evaluation(zoo), ""
    rows: dict[str, tuple[Model, float, dict[str, Result]]] = {}
    for model in _models(zoo):
        if model.quantized or not any(part in model.name for part in only.split(",")):
            continue
        fed: list[Arrays] = []
        metric = METRIC_OF_TASK[model.task]
        original = float(evaluation.evaluate(model.entry, _recording(model, fed), None)[metric])
        calibration = _calibration(fed)
        results: dict[str, Result] = {}
        for name, run, seconds in _runners(model, target, calibration, weights, wanted, nncf):
            results[name] = Result(float(evaluation.evaluate(model.entry, run, None)[metric]), seconds)
            console.print(f"{model.name}: float {original:.4f}, {name} {results[name].metric:.4f}, {seconds:.1f} s")
        rows[model.name] = (model, original, results)
        text = _markdown(rows, weights, target, qualities)
        if not only:  # after each model, for all of them take long
            (RESULTS / f"quantizers-{'w8a8' if weights == 'int8' else 'w4a8'}.md").write_text(text)
    console.print(text)


def _recording(model: Model, fed: list[Arrays]) -> Runner:
    run = _session(model.path.read_bytes())

    def recorded(inputs: Arrays) -> list[np.ndarray]:
        fed.append(inputs)
        return run(inputs)

    return recorded


def _runners(
    model: Model,
    target: str,
    calibration: dict[str, np.ndarray],
    weights: WeightType,
    qualities: tuple[Quality, ...],
    nncf: Path | None,
) -> Iterator[tuple[str, Runner, float]]:
    """Each quantizer's name, its model, and the seconds it took."""
    start = time.perf_counter()
    chip = load_target(target)
    graph = run_passes(import_onnx(model.path), (*SIMPLIFY, *legalize(chip)), stage="simplify")
    data = load_dataset(calibration, input_specs(graph))
    ranges = calibrate(graph, data, symmetric=chip.quantization.activations.symmetric)
    formats = plan(graph, ranges, chip, (), WeightRequest(weights))
    planned = time.perf_counter() - start
    for quality in qualities:
        start = time.perf_counter()
        repaired = repair(graph, formats, data, EFFORTS[quality])
        quantized = ir.to_proto(quantize(graph, repaired)).SerializeToString()
        yield quality, _session(quantized, optimize=False), planned + time.perf_counter() - start
    if weights != "int8":
        return
    start = time.perf_counter()
    quantized = _by_onnxruntime(model, calibration)
    yield "onnxruntime", _session(quantized, optimize=False), time.perf_counter() - start
    if nncf is not None:
        start = time.perf_counter()
        quantized = _by_nncf(model, calibration, nncf)
        yield "NNCF", _session(quantized, optimize=False), time.perf_counter() - start


class _Reader(CalibrationDataReader):
    """The calibration samples, one at a time."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        count = len(next(iter(arrays.values())))
        self.samples = iter([{name: array[i : i + 1] for name, array in arrays.items()} for i in range(count)])

    def get_next(self) -> dict[str, np.ndarray]:
        return next(self.samples, {})


def _by_onnxruntime(model: Model, calibration: Mapping[str, np.ndarray]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        ready, quantized = Path(folder) / "ready.onnx", Path(folder) / "quantized.onnx"
        quant_pre_process(str(model.path), str(ready), skip_symbolic_shape=True)
        for per_channel in (True, False):
            try:
                quantize_static(
                    str(ready),
                    str(quantized),
                    _Reader(calibration),
                    quant_format=QuantFormat.QDQ,
                    per_channel=per_channel,
                )
                break
            except ValueError:
                # onnxruntime 1.32 cannot adjust per-channel scales of a MatMul to its bias.
                if not per_channel:
                    raise
        return quantized.read_bytes()


def _by_nncf(model: Model, calibration: Mapping[str, np.ndarray], python: Path) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        arrays, quantized = Path(folder) / "calibration.npz", Path(folder) / "quantized.onnx"
        np.savez(arrays, allow_pickle=False, **calibration)
        command = [str(python), str(NNCF_SCRIPT), str(model.path), str(arrays), str(quantized)]
        subprocess.run(command, check=True, capture_output=True)
        return quantized.read_bytes()


def _lost(model: Model, original: float, metric: float) -> str:
    if model.task == "recon":
        return f"{100 * (metric / original - 1):+.2f} %"
    return f"{100 * (original - metric):+.2f}"


def _markdown(
    rows: Mapping[str, tuple[Model, float, Mapping[str, Result]]], weights: WeightType, target: str, qualities: str
) -> str:
    names = list(dict.fromkeys(name for _, _, results in rows.values() for name in results))
    lines = [
        f"# Accuracy lost by quantizing, {'8' if weights == 'int8' else '4'}-bit weights, 8-bit activations",
        "",
        "Points of the metric lost (negative: gained), for the autoencoder percent of reconstruction error; in "
        f"brackets the seconds it took. All calibrated on the same {CALIBRATION_SAMPLES} samples, run in onnxruntime "
        f"{ort.__version__}. Made by `benchmarks/quantizers.py --target {target} --weights {weights} "
        f"--qualities {qualities}`.",
        "",
        "| model | metric | float | " + " | ".join(names) + " |",
        "|" + "---|" * (3 + len(names)),
    ]
    for model, original, results in rows.values():
        cells = [
            f"{_lost(model, original, results[name].metric)} ({results[name].seconds:.0f} s)" if name in results else ""
            for name in names
        ]
        lines.append(f"| {model.name} | {METRIC_OF_TASK[model.task]} | {original:.4f} | " + " | ".join(cells) + " |")
    means = [
        np.mean([100 * (o - r[name].metric) for m, o, r in rows.values() if m.task == "cls" and name in r])
        for name in names
    ]
    lines.append("| mean of classifiers | top1 | | " + " | ".join(f"{mean:+.2f}" for mean in means) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    typer.run(main)
