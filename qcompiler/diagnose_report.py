"""What `qcompile debug` found out: typed, as JSON, and as tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Cause = Literal[
    "range outlier", "channel imbalance", "saturating accumulator", "zero-point clash", "shared scale clash",
    "clipped range", "few bits", "rounding",
]  # fmt: skip


@dataclass(frozen=True)
class LayerNoise:
    """One row: an operator with what is fused into it, or the rounding of an input ("input")."""

    layer: str
    op: str
    reads: str
    """Types of the activations it reads."""
    weights: str
    """Type of its constants, "" if it has none."""
    activations: str
    """Type of its output."""
    alone: float | None
    """SQNR in dB at the model's worst output with only this layer quantized; None if that changes no output."""
    so_far: float | None
    """SQNR in dB at its own output with everything up to it quantized; None if exact, or an input."""
    share: float
    """Of the noise all layers make, each alone."""


@dataclass(frozen=True)
class Finding:
    """Why one of the worst layers hurts."""

    layer: str
    op: str
    share: float
    cause: Cause
    evidence: str
    advice: str
    sqnr_without: float | None
    """SQNR in dB of the model with the layers in float that the advice names for it."""
    sqnr_wide: float | None = None
    """The same with those layers reading 16 bits that the advice names, if it does."""


@dataclass(frozen=True)
class Diagnosis:
    model: str
    target: str
    samples: int
    synthetic: bool
    """Whether random inputs stood in for calibration data."""
    sqnr: float | None
    """Of the quantized model's worst output, dB; None if it equals the float one."""
    layers: tuple[LayerNoise, ...]
    """In execution order."""
    findings: tuple[Finding, ...]
    """Worst first."""
    kept_float: Mapping[str, str]
    """Operators that are not quantized, and why."""

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return _ADAPTER.dump_python(self, mode="json")


_ADAPTER: TypeAdapter[Diagnosis] = TypeAdapter(Diagnosis)


def render(diagnosis: Diagnosis) -> RenderableType:
    """For a terminal."""
    worst = {finding.layer for finding in diagnosis.findings}
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for header, number in (
        ("layer", False), ("operator", False), ("reads", False), ("weights", False), ("output", False), ("alone", True),
        ("so far", True), ("of the noise", True),
    ):  # fmt: skip
        table.add_column(header, justify="right" if number else "left", no_wrap=number)
    for layer in diagnosis.layers:
        cells = (layer.layer, layer.op, layer.reads, layer.weights, layer.activations, _decibels(layer.alone),
                 "" if layer.op == "input" else _decibels(layer.so_far), f"{layer.share:.1%}")  # fmt: skip
        table.add_row(*(Text(cell) for cell in cells), style="yellow" if layer.layer in worst else "")
    parts: list[RenderableType] = [
        Text(f"{diagnosis.model} for {diagnosis.target}: SQNR {_decibels(diagnosis.sqnr)}", style="bold"),
        Text(f"on {diagnosis.samples} samples. alone: at the model's output, with only this layer quantized; "
             "so far: at the layer's output, with everything up to it quantized."),
        table,
    ]  # fmt: skip
    for finding in diagnosis.findings:
        parts += [
            Text.assemble(
                (finding.layer, "bold"), f" ({finding.op}), {finding.share:.0%} of the noise: ",
                (finding.cause, "yellow"),
            ),
            Text(f"  {finding.evidence}."),
            Text(f"  What helps: {finding.advice}. In float, the model has {_decibels(finding.sqnr_without)}"
                 + (f", with 16 bits {_decibels(finding.sqnr_wide)}." if finding.sqnr_wide is not None else ".")),
            Text(),
        ]  # fmt: skip
    if diagnosis.kept_float:
        parts.append(Text(f"{len(diagnosis.kept_float)} operators stay in float and are not listed."))
    if diagnosis.synthetic:
        parts.append(
            Text("Ranges and noise come from synthetic random inputs, because no --calibration was given: they say "
                 "little about real data.", style="bold red")
        )  # fmt: skip
    return Group(*parts)


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"
