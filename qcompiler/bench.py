"""`qcompile bench`: one model on several targets, and on changed ones, side by side. Nothing is built."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from pydantic import TypeAdapter
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from qcompiler.compile import DEFAULTS, SILENT, Placed, Progress, estimate, place
from qcompiler.errors import QCompilerError
from qcompiler.exact_session import exact_session
from qcompiler.options import Options
from qcompiler.report import Report, SelfCheck, byte_count, quantity
from qcompiler.selfcheck import Arrays, self_check


@dataclass(frozen=True)
class Column:
    """What one inference costs on one target."""

    target: str
    """With its overrides, as reports name it."""
    latency: float
    """Seconds."""
    inferences_per_second: float
    npu_cycles: float
    utilisation: float | None
    """MACs done over MACs the engines could have done while the accelerator worked; None without an accelerator."""
    macs: int
    npu_macs: int
    peak_sram: int
    """Bytes; `sram` is the size of the scratchpad, 0 without an accelerator."""
    sram: int
    traffic: Mapping[str, int]
    """Bytes read and written, by memory."""
    weights: int
    """Bytes."""
    energy: float
    """Joules."""
    fallbacks: Mapping[str, int]
    """Operators the accelerator leaves to the CPU: how many, by operator."""
    sqnr: float | None
    """Of the worst output against the float model, dB; None if not measured (no calibration data) or identical."""
    top1_agreement: float | None
    """Share of samples on which both rank the same class first; None if not measured."""


@dataclass(frozen=True)
class Comparison:
    model: str
    columns: tuple[Column, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return _ADAPTER.dump_python(self, mode="json")


_ADAPTER: TypeAdapter[Comparison] = TypeAdapter(Comparison)


def bench(
    model: str | os.PathLike[str],
    targets: Sequence[str],
    variants: Sequence[Sequence[str]] = (),
    options: Options = DEFAULTS,
    *,
    progress: Progress = SILENT,
) -> Comparison:
    """Estimate a model on each target as it is, and on each again with each variant's overrides.

    Args:
        targets: bundled targets' names, or YAML specs.
        variants: lists of overrides such as "memories.sram.size=512KiB".
        options: with calibration data, the quantized model is also run beside the float one; `overrides` hold for every
            column.
        Others: as in `compile.compile`.

    Raises:
        QCompilerError: anything wrong with what was given.
    """
    if not targets:
        raise QCompilerError("--targets names none; give some with commas between, as in arm-npu,systolic-npu.")
    columns: list[Column] = []
    for target in targets:
        for overrides in ((), *variants):
            placed = place(model, target, replace(options, overrides=[*options.overrides, *overrides]), progress)
            check = None
            if options.calibration is not None:
                progress.stage("self-check")
                check = self_check(placed.source, _runner(placed), placed.samples)
            report, _ = estimate(placed, progress)
            columns.append(_column(report, check))
    return Comparison(os.path.basename(os.fspath(model)), tuple(columns))


def _runner(placed: Placed) -> Callable[[Arrays], Arrays]:
    """Runs the quantized model in onnxruntime."""
    session = exact_session(ir.to_proto(placed.quantized).SerializeToString())
    names = [output.name for output in session.get_outputs()]

    def run(arrays: Arrays) -> Arrays:
        outputs = session.run(names, dict(arrays))
        return {name: np.asarray(output) for name, output in zip(names, outputs, strict=True)}

    return run


def _column(report: Report, check: SelfCheck | None) -> Column:
    totals = report.totals
    busy = [
        (row.cycles, row.utilisation or 0.0) for row in report.layers if row.backend in ("npu", "dsp") and row.engine
    ]
    fallbacks: dict[str, int] = {}
    for item in report.placements:
        if item.reason:
            fallbacks[item.op] = fallbacks.get(item.op, 0) + 1
    outputs = check.outputs if check is not None else ()
    return Column(
        target=report.target,
        latency=totals.latency,
        inferences_per_second=totals.inferences_per_second,
        npu_cycles=totals.npu_cycles,
        utilisation=sum(cycles * share for cycles, share in busy) / totals.npu_cycles if totals.npu_cycles else None,
        macs=totals.macs,
        npu_macs=totals.npu_macs,
        peak_sram=totals.peak_sram,
        sram=totals.sram,
        traffic=totals.traffic,
        weights=totals.weights,
        energy=totals.energy,
        fallbacks=fallbacks,
        sqnr=min((output.sqnr for output in outputs if output.sqnr is not None), default=None),
        top1_agreement=min(
            (output.top1_agreement for output in outputs if output.top1_agreement is not None), default=None
        ),
    )


# --- as a table ---------------------------------------------------------------------------------------------


def render(comparison: Comparison) -> Table:
    """Figures down, targets across; the ratio in brackets is to the first column."""
    columns = comparison.columns
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in columns:
        name = column.target.replace(" with ", "\n").replace(", ", "\n").replace("memories.", "")
        table.add_column(Text(name), justify="right", overflow="fold")
    first = columns[0]
    rows: list[tuple[str, list[str]]] = [
        ("latency", [_against(quantity(c.latency, "s"), c.latency, first.latency) for c in columns]),
        ("inferences/s", [f"{c.inferences_per_second:,.0f}" for c in columns]),
        ("accelerator cycles", [f"{c.npu_cycles:,.0f}" if c.sram else "" for c in columns]),
        ("MAC utilisation", ["" if c.utilisation is None else f"{c.utilisation:.0%}" for c in columns]),
        ("MACs", [f"{c.macs:,}" for c in columns]),
        (
            "on the accelerator",
            [f"{c.npu_macs / c.macs:.1%}" if (c.sram or c.npu_macs) and c.macs else "" for c in columns],
        ),
        ("operators fallen back", [_fallbacks(c) for c in columns]),
        ("peak SRAM", [f"{byte_count(c.peak_sram)} of {byte_count(c.sram)}" if c.sram else "" for c in columns]),
    ]
    for memory in dict.fromkeys(name for column in columns for name in column.traffic):
        moved = [byte_count(c.traffic[memory]) if memory in c.traffic else "" for c in columns]
        rows.append((f"{memory} traffic", moved))
    rows += [
        ("weights", [byte_count(c.weights) for c in columns]),
        ("energy", [_against(quantity(c.energy, "J"), c.energy, first.energy) for c in columns]),
        ("SQNR", ["" if c.sqnr is None else f"{c.sqnr:.1f} dB" for c in columns]),
        ("top-1 agreement", ["" if c.top1_agreement is None else f"{c.top1_agreement:.1%}" for c in columns]),
    ]
    for name, cells in rows:
        if any(cells):
            table.add_row(Text(name), *(Text(cell) for cell in cells))
    return table


def _against(text: str, value: float, first: float) -> str:
    return text if value == first or not first else f"{text} ({value / first:.2f}×)"


def _fallbacks(column: Column) -> str:
    if not column.sram:
        return ""
    listed = ", ".join(f"{op} {count}" if count > 1 else op for op, count in column.fallbacks.items())
    return f"{sum(column.fallbacks.values())}: {listed}" if listed else "0"
