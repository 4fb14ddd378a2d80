"""Finetuning in few bits, beside plain rounding: `qcompile finetune` on the digits example and models of the zoo.

    OMP_NUM_THREADS=1 python benchmarks/finetune.py [--target systolic-npu] [--epochs 60] [--only NAME] [--zoo DIR]

Needs the extra `finetune` (PyTorch). The float model is the only teacher: no labels are learned from. Samples measured
on are neither calibrated on nor learned from. Each finetuned model is then compiled as it was written, and the bundle's
outputs are compared with the integer reference, bit by bit. Writes results/finetune.md if no model was left out. Exits
with 1 if a model of `GOALS` with 4-bit weights and activations loses more than a point or takes three minutes, or if a
bundle differs.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer
from accuracy import DEFAULT_ZOO, RESULTS, _load_evaluation, _models
from mixed_precision import _samples
from rich.console import Console

import qcompiler
from qcompiler.compile import place
from qcompiler.finetune.finetune import finetune
from qcompiler.finetune.options import Schedule, TrainedActivations
from qcompiler.finetune.results import Finetuned
from qcompiler.graph import value_name
from qcompiler.integer.reference import Executor
from qcompiler.options import Options
from qcompiler.quant.types import WeightRequest, WeightType

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ZOO_MODELS = ("mnist_cnn", "kws_dscnn")
GOALS = ("digits", "mnist_cnn")
"""Models that must recover; the others have few samples for what they lose."""
LEARNED = 256
"""Samples to calibrate on and learn from, at most half of those there are."""
COMPARED = 32
"""Samples on which bundle and reference are compared."""
SECONDS, POINTS = 180, 0.01
"""What finetuning may take and lose with four bits."""
SEED = 0
HEADER = (
    "model", "formats", "learned from", "measured on", "float", "rounded", "finetuned", "same class as float, rounded",
    "finetuned", "seconds", "bundle differs",
)  # fmt: skip


@dataclass(frozen=True)
class Form:
    name: str
    weights: WeightType
    activations: TrainedActivations
    edges: bool


FORMS = (
    Form("W4A4, 8 bits at the edges", "int4", "int4", edges=False),
    Form("W4A4 everywhere", "int4", "int4", edges=True),
    Form("W2A4, 8 bits at the edges", "int2", "int4", edges=False),
    Form("W2A4 everywhere", "int2", "int4", edges=True),
)


@dataclass(frozen=True)
class Case:
    name: str
    path: Path
    learned: Mapping[str, np.ndarray]
    measured: Mapping[str, np.ndarray]
    """With labels."""


@dataclass(frozen=True)
class Row:
    case: Case
    form: Form
    found: Finetuned
    seconds: float
    different: int
    """Outputs of the bundle that are not the reference's."""
    outputs: int

    @property
    def passes(self) -> bool:
        lost = _known(self.found.float_top1) - _known(self.found.after.top1)
        must_recover = self.case.name in GOALS and self.form.weights == "int4"
        return self.different == 0 and (not must_recover or (lost <= POINTS and self.seconds < SECONDS))

    def cells(self) -> Sequence[str]:
        before, after = self.found.before, self.found.after
        shares = (self.found.float_top1, before.top1, after.top1, before.agreement, after.agreement)
        return (
            self.case.name, self.form.name, str(self.found.trained_on), str(after.samples),
            *(f"{_known(share):.2%}" for share in shares), f"{self.seconds:.0f}",
            f"{self.different} of {self.outputs}",
        )  # fmt: skip


def main(
    target: Annotated[str, typer.Option(help="a bundled target's name, or a spec")] = "systolic-npu",
    epochs: Annotated[int, typer.Option(help="times every sample is learned from")] = Schedule().epochs,
    only: Annotated[str, typer.Option(help="models whose name contains this")] = "",
    zoo: Annotated[Path, typer.Option(help="folder of models and data")] = DEFAULT_ZOO,
) -> None:
    """Finetune, compile, compare, print, write."""
    console, rows = Console(width=200), list[Row]()
    for case in _cases(zoo, only):
        for form in FORMS if case.name in GOALS else FORMS[:2]:
            rows.append(_measure(case, form, target, epochs))
            console.print(" | ".join(rows[-1].cells()))
    text = "\n".join(
        [
            f"# Finetuning in few bits for {target}",
            "",
            f"Made by `benchmarks/finetune.py --target {target} --epochs {epochs}`. Top-1 of the float model, of the "
            "same formats rounded without training, and finetuned: distilled from the float model, without labels. "
            "Samples measured on are neither calibrated on nor learned from. Seconds are those of the whole command. "
            f"The last column counts outputs of the bundle that differ from the integer reference, on {COMPARED} "
            "samples.",
            "",
            "| " + " | ".join(HEADER) + " |",
            "|" + "---|" * len(HEADER),
            *("| " + " | ".join(row.cells()) + " |" for row in rows),
            "",
        ]
    )
    if not only:
        (RESULTS / "finetune.md").write_text(text)
    sys.exit(0 if all(row.passes for row in rows) else 1)


def _cases(zoo: Path, only: str) -> list[Case]:
    cases: list[Case] = []
    if only in "digits":
        with np.load(EXAMPLES / "digits_calibration.npz") as learned, np.load(EXAMPLES / "digits_test.npz") as measured:
            cases.append(Case("digits", EXAMPLES / "digits.onnx", dict(learned), dict(measured)))
    evaluation = _load_evaluation(zoo)
    for model in _models(zoo):
        if model.name in ZOO_MODELS and only in model.name:
            inputs, labels = _samples(model, evaluation.evaluate, zoo)
            order = np.random.default_rng(SEED).permutation(len(labels))
            count = min(LEARNED, len(labels) // 2)
            learned, measured = (
                {name: array[part] for name, array in inputs.items()} for part in (order[:count], order[count:])
            )
            cases.append(Case(model.name, model.path, learned, {**measured, "labels": labels[order[count:]]}))
    return cases


def _measure(case: Case, form: Form, target: str, epochs: int) -> Row:
    options = Options(calibration=case.learned, formats=WeightRequest(form.weights, edges=form.edges))
    with TemporaryDirectory() as folder:
        tuned = Path(folder) / "tuned.onnx"
        start = time.perf_counter()
        found = finetune(
            case.path, target, options, tuned, activations=form.activations, schedule=Schedule(epochs),
            evaluation=case.measured,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        bundle = qcompiler.compile(tuned, target, output=Path(folder) / "tuned.qc")
        model = place(tuned, target).integer
        reference, names = Executor(model), [value_name(value) for value in model.graph.inputs]
        samples = {name: case.measured[name][:COMPARED] for name in names}
        got, different, outputs = bundle.run(samples), 0, 0
        for index in range(COMPARED):
            wanted = reference.run({name: array[index : index + 1] for name, array in samples.items()})
            for name, array in wanted.items():
                different += int(np.sum(got[name][index : index + 1] != array))
                outputs += array.size
    return Row(case, form, found, seconds, different, outputs)


def _known(value: float | None) -> float:
    assert value is not None, "every sample has a label"
    return value


if __name__ == "__main__":
    typer.run(main)
