"""Accuracy of 8-bit weights and activations: ours beside other quantizers, on the same calibration data.

    python benchmarks/quantizers.py [--target x86-cpu] [--quality balanced] [--draws 5] [--only NAMES] [--nncf PYTHON]

Every quantized model is run by onnxruntime without its graph rewrites, on the samples that were not calibrated on.
Which these are changes the metric by chance, so they are drawn several times: the first draw is spread evenly over the
data, the others are random. The face detector, whose metric needs no labels, is evaluated on images of other data too.
How far the difference of two quantizers' metrics is due to the choice of test samples is estimated by a bootstrap, the
same samples for both. Beside the metric stand two measures with less noise: how often the quantized model chooses
the float model's class, and the power of the outputs over that of their error. The others are onnxruntime's
`quantize_static` as it comes but per channel where it can, and NNCF's `quantize` with its defaults if --nncf names the
Python of an environment that holds nncf, onnx and onnxruntime. Writes results/quantizers-w8a8.md if no model was left
out.
"""

import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated

import numpy as np
import onnx
import onnxruntime as ort
import typer
from accuracy import (
    CALIBRATION_SAMPLES,
    DEFAULT_ZOO,
    METRIC_OF_TASK,
    RESULTS,
    Arrays,
    Format,
    Model,
    Runner,
    _load_evaluation,
    _models,
    _quantized,
    _session,
    _spread,
    held_out,
    recorded,
)
from faces import with_more_faces
from onnx import version_converter
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from paired import REPETITIONS, Contributions, contributions, standard_error
from rich.console import Console

from qcompiler.quant.types import Quality

OPSET = 13
"""Older ones have no scales per channel."""
OURS = "qcompiler"
SIGNIFICANT = 2
"""Standard errors beyond which a difference is counted."""
NNCF_SCRIPT = Path(__file__).parent / "nncf_quantize.py"

Calibration = Mapping[str, np.ndarray]
Quantizer = Callable[[Model, Calibration], Runner]


@dataclass(frozen=True)
class Row:
    """One model."""

    model: Model
    original: float
    """The float model's metric, on all samples."""
    samples: int
    places: Sequence[np.ndarray]
    """Which samples each draw was evaluated on."""
    found: "Mapping[str, Sequence[Result]]"
    """By quantizer, each draw's."""

    def against(self, name: str) -> tuple[float, float]:
        """How much more one loses than ours, the mean over draws, and its standard error."""
        ours, theirs = self.found[OURS], self.found[name]
        difference = float(np.mean([b.lost - a.lost for a, b in zip(ours, theirs, strict=True)]))
        error = 100 * standard_error(
            [each.contributions for each in ours],
            [each.contributions for each in theirs],
            self.places,
            self.samples,
        )
        return difference, error / self.original if self.model.task == "recon" else error


@dataclass(frozen=True)
class Result:
    """One quantizer on one draw."""

    lost: float
    """Points of the metric, or percent of reconstruction error gained."""
    agreement: float | None
    """Percent of samples in which the class is the float model's; None without classes."""
    sqnr: float
    """Decibels, the mean over outputs."""
    seconds: float
    """It took to quantize."""
    contributions: Contributions
    """Of the samples evaluated."""


def main(
    target: Annotated[str, typer.Option(help="a bundled target's name, or a spec")] = "x86-cpu",
    quality: Annotated[Quality, typer.Option(help="of ours")] = "balanced",
    draws: Annotated[int, typer.Option(help="of calibration samples")] = 5,
    only: Annotated[str, typer.Option(help="models whose name contains one of these, by comma")] = "",
    zoo: Annotated[Path, typer.Option(help="folder of models and data")] = DEFAULT_ZOO,
    nncf: Annotated[Path | None, typer.Option(help="Python of an environment with NNCF")] = None,
) -> None:
    """Quantize, evaluate, print, write."""

    def ours(model: Model, calibration: Calibration) -> Runner:
        return _quantized(model, target, dict(calibration), Format.W8A8, quality)

    quantizers: dict[str, Quantizer] = {OURS: ours, "onnxruntime": _by_onnxruntime}
    if nncf is not None:
        quantizers["NNCF"] = lambda model, calibration: _by_nncf(model, calibration, nncf)
    console, evaluation, text = Console(width=160), _load_evaluation(zoo), ""
    rows: list[Row] = []
    for model in _models(zoo):
        if model.quantized or not any(part in model.name for part in only.split(",")):
            continue
        with tempfile.TemporaryDirectory() as folder:
            extended = with_more_faces(model, _session(model.path.read_bytes()), evaluation, Path(folder))
            rows.append(_row(extended, evaluation, quantizers, draws, console))
        text = _markdown(rows, target, quality, draws)
        if not only:  # after each model, for all of them take long
            (RESULTS / "quantizers-w8a8.md").write_text(text)
    console.print(text)


def _row(
    model: Model, evaluation: ModuleType, quantizers: Mapping[str, Quantizer], draws: int, console: Console
) -> Row:
    fed, run = recorded(model, evaluation)
    exact = [run(inputs) for inputs in fed]
    found = {name: list[Result]() for name in quantizers}
    chosen = [_draw(model.learnable or len(fed), draw) for draw in range(draws)]
    for draw, indices in enumerate(chosen):
        for name, quantizer in quantizers.items():
            result = _measure(model, evaluation, fed, exact, indices, quantizer)
            found[name].append(result)
            console.print(
                f"{model.name}, draw {draw}, {name}: lost {result.lost:+.3f}, SQNR {result.sqnr:.2f} dB, "
                f"{result.seconds:.1f} s",
                highlight=False,
            )
    original = float(evaluation.evaluate(model.entry, run, None)[METRIC_OF_TASK[model.task]])
    places = [np.delete(np.arange(len(fed)), indices) for indices in chosen]
    return Row(model, original, len(fed), places, found)


def _draw(count: int, draw: int) -> np.ndarray:
    """Indices to calibrate on."""
    wanted = min(CALIBRATION_SAMPLES, count // 2)
    if draw == 0:
        return _spread(count, wanted)
    return np.sort(np.random.default_rng(draw).permutation(count)[:wanted])


def _measure(
    model: Model,
    evaluation: ModuleType,
    fed: Sequence[Arrays],
    exact: Sequence[list[np.ndarray]],
    chosen: np.ndarray,
    quantizer: Quantizer,
) -> Result:
    metric = METRIC_OF_TASK[model.task]
    kept = [exact[index] for index in sorted(set(range(len(fed))).difference(chosen.tolist()))]
    with tempfile.TemporaryDirectory() as folder:
        entry, calibration = held_out(model, fed, Path(folder), chosen)
        start = time.perf_counter()
        run = quantizer(model, calibration)
        seconds = time.perf_counter() - start
        coarse: list[list[np.ndarray]] = []

        def recording(inputs: Arrays) -> list[np.ndarray]:
            coarse.append(run(inputs))
            return coarse[-1]

        replayed = iter(kept)
        original = float(evaluation.evaluate(entry, lambda _: next(replayed), None)[metric])
        quantized = float(evaluation.evaluate(entry, recording, None)[metric])
        contributed, exactly = (contributions(entry, outputs, evaluation) for outputs in (coarse, kept))
        once = np.ones(len(kept), int)
        for each, value in ((contributed, quantized), (exactly, original)):
            assert np.isclose(each.metric(once), value, rtol=1e-5, atol=0), (model.name, metric)
    lost = 100 * (quantized / original - 1) if model.task == "recon" else 100 * (original - quantized)
    agreement = None
    if model.task == "cls":
        pairs = zip(coarse, kept, strict=True)
        agreement = 100 * float(np.mean([ours[0].argmax() == theirs[0].argmax() for ours, theirs in pairs]))
    return Result(lost, agreement, _sqnr(coarse, kept), seconds, contributed)


def _sqnr(coarse: Sequence[list[np.ndarray]], exact: Sequence[list[np.ndarray]]) -> float:
    ratios: list[float] = []
    for output in range(len(exact[0])):
        wanted = np.stack([each[output] for each in exact]).astype(np.float64)
        error = np.stack([each[output] for each in coarse]) - wanted
        ratios.append(10 * np.log10(np.square(wanted).sum() / max(float(np.square(error).sum()), 1e-30)))
    return float(np.mean(ratios))


class _Reader(CalibrationDataReader):
    """The calibration samples, one at a time."""

    def __init__(self, arrays: Calibration) -> None:
        count = len(next(iter(arrays.values())))
        self.samples = iter([{name: array[i : i + 1] for name, array in arrays.items()} for i in range(count)])

    def get_next(self) -> dict[str, np.ndarray]:
        return next(self.samples, {})


def _by_onnxruntime(model: Model, calibration: Calibration) -> Runner:
    with tempfile.TemporaryDirectory() as folder:
        ready, quantized = Path(folder) / "ready.onnx", Path(folder) / "quantized.onnx"
        source, proto = model.path, onnx.load(model.path)
        if next(each.version for each in proto.opset_import if each.domain in ("", "ai.onnx")) < OPSET:
            source = Path(folder) / "converted.onnx"
            onnx.save(version_converter.convert_version(proto, OPSET), source)
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
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
        return _session(quantized.read_bytes(), optimize=False)


def _by_nncf(model: Model, calibration: Calibration, python: Path) -> Runner:
    with tempfile.TemporaryDirectory() as folder:
        arrays, quantized = Path(folder) / "calibration.npz", Path(folder) / "quantized.onnx"
        np.savez(arrays, allow_pickle=False, **calibration)
        command = [str(python), str(NNCF_SCRIPT), str(model.path), str(arrays), str(quantized)]
        subprocess.run(command, check=True, capture_output=True)
        return _session(quantized.read_bytes(), optimize=False)


def _markdown(rows: Sequence[Row], target: str, quality: Quality, draws: int) -> str:
    lines = [
        "# Accuracy lost by quantizing, 8-bit weights and activations",
        "",
        "Points of the metric lost (negative: gained), for the autoencoder percent of reconstruction error, on samples "
        f"that were not calibrated on. All quantizers calibrate on the same {CALIBRATION_SAMPLES} samples (half of "
        "smaller sets): in the first draw those spread evenly over the data, in the others random ones. ± of what is "
        "lost is the standard error of the mean over draws; it does not say how the metric would differ on other data. "
        "The face detector's metric is agreement with its float model; it is evaluated on the images of the other data "
        "sets too, which are not calibrated on. More than ours: what is lost less what ours loses, the mean over "
        f"draws, ± its standard error by the choice of test samples (bootstrap, {REPETITIONS} repetitions, the same "
        "samples for both). Same class: as the float model. Run in "
        f"onnxruntime {ort.__version__} without its rewrites; models of opsets before {OPSET} are converted for the "
        f"others. Made by `benchmarks/quantizers.py --target {target} "
        f"--quality {quality} --draws {draws} --nncf PYTHON`.",
        "",
        f"| model | metric, float | quantizer | lost, first draw | lost, {draws} draws | more than ours | same class "
        "| SQNR |",
        "|---|---|---|---|---|---|---|---|",
    ]
    compared = list[tuple[float, float]]()
    for row in rows:
        unit = " %" if row.model.task == "recon" else ""
        for name, results in row.found.items():
            agreements = [each.agreement for each in results if each.agreement is not None]
            more = ""
            if name != OURS:
                compared.append(row.against(name))
                more = f"{compared[-1][0]:+.2f} ± {compared[-1][1]:.2f}{unit}"
            cells = (
                row.model.name,
                f"{METRIC_OF_TASK[row.model.task]} {row.original:.4f}",
                name,
                f"{results[0].lost:+.2f}{unit}",
                f"{_mean([each.lost for each in results], '+.2f')}{unit}",
                more,
                f"{_mean(agreements, '.2f')} %" if agreements else "",
                f"{_mean([each.sqnr for each in results], '.2f')} dB",
            )
            lines.append("| " + " | ".join(cells) + " |")
    classifiers = [row.found for row in rows if row.model.task == "cls"]
    if classifiers:
        means = [
            f"{name} {np.mean([each.lost for found in classifiers for each in found[name]]):+.2f}"
            for name in classifiers[0]
        ]
        lines += ["", f"Mean over classifiers and draws, points lost: {', '.join(means)}."]
    better = sum(difference > SIGNIFICANT * error for difference, error in compared)
    worse = sum(difference < -SIGNIFICANT * error for difference, error in compared)
    lines += [
        "",
        f"Of {len(compared)} differences, {better} are in favour of ours by more than {SIGNIFICANT} standard errors, "
        f"{worse} against it, and {len(compared) - better - worse} within them.",
    ]
    return "\n".join([*lines, ""])


def _mean(values: Sequence[float], form: str) -> str:
    """Mean and standard error."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{np.mean(values):{form}} ± {error:.2f}"


if __name__ == "__main__":
    typer.run(main)
