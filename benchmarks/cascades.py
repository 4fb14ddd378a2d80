"""What operator cascades are worth: networks in small scratchpads, compiled with and without.

    python benchmarks/cascades.py [--zoo DIR] [--only NAME]

Writes benchmarks/results/cascades.md. "Without" is the same spec with `rolling_buffers: false`. Networks are calibrated
on random inputs: costs do not depend on values, but for the size of encoded weights.
"""

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import networks
import typer

from qcompiler.compile import estimate, place
from qcompiler.options import Options
from qcompiler.report import Report, Totals

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cascades.md"
DEFAULT_ZOO = Path(os.environ.get("QCOMPILER_ZOO", ROOT.parent / "shared" / "zoo"))

ZOO = ("squeezenet11", "mobilenet_v1_025_128", "fastestdet_352", "ultraface_slim_320")
SCRATCHPADS = {"arm-npu": (64, 128, 256), "systolic-npu": (64, 128, 256)}
"""KiB by target."""


@dataclass(frozen=True)
class Row:
    network: str
    target: str
    kib: int
    without: Totals
    taken: Report
    seconds: float
    """What the search took, beside scheduling without it."""

    @property
    def cells(self) -> tuple[str, ...]:
        old, new = self.without, self.taken.totals
        operators = sum(len(cascade.layers) for cascade in self.taken.cascades)
        return (
            self.network,
            self.target,
            f"{self.kib} KiB",
            f"{len(self.taken.cascades)} of {operators}",
            *_pair(_outside(old) / 1e6, _outside(new) / 1e6, 2),
            *_pair(old.npu_cycles / 1e6, new.npu_cycles / 1e6, 2),
            *_pair(old.energy * 1e3, new.energy * 1e3, 3),
            f"{self.seconds:.1f} s",
        )


def _pair(old: float, new: float, digits: int) -> tuple[str, str]:
    return f"{old:.{digits}f} → {new:.{digits}f}", f"{new / old - 1:+.0%}"


def _outside(totals: Totals) -> int:
    """Bytes to and from every memory but the scratchpad."""
    return sum(size for memory, size in totals.traffic.items() if memory != "sram")


def _measure(network: str, path: Path, target: str, kib: int) -> Row:
    def estimated(*overrides: str) -> tuple[Report, float]:
        placed = place(path, target, Options(overrides=(f"memories.sram.size={kib}KiB", *overrides)))
        started = time.process_time()
        report = estimate(placed)[0]
        return report, time.process_time() - started

    without, plain = estimated("npu.rolling_buffers=false")
    taken, searched = estimated()
    return Row(network, target, kib, without.totals, taken, searched - plain)


HEADER = ("network", "target", "scratchpad", "cascades", "MB outside", "", "Mcycles", "", "mJ", "", "search")


def main(
    zoo: Annotated[Path, typer.Option(help="The model zoo.")] = DEFAULT_ZOO,
    only: Annotated[str, typer.Option(help="Networks whose name contains this.")] = "",
) -> None:
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    with TemporaryDirectory() as folder:
        paths = {name: zoo / "models" / f"{name}.onnx" for name in ZOO}
        paths["mobilenet_v2"] = networks.mobilenet_v2(Path(folder) / "mobilenet_v2.onnx")
        for name, path in paths.items():
            for target, sizes in SCRATCHPADS.items():
                for kib in sizes if only in name else ():
                    rows.append(_measure(name, path, target, kib))
                    print(" | ".join(rows[-1].cells), flush=True)
    lines = [HEADER, ("---",) * len(HEADER), *(row.cells for row in rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    text = f"""# Operator cascades in small scratchpads

Bytes to and from memories outside the scratchpad, cycles of the accelerator, and energy of an inference, without → with
cascades; how many cascades of how many operators in all; CPU time of the search. Made by `benchmarks/cascades.py`.

{table}
"""
    if not only:
        RESULTS.write_text(text)


if __name__ == "__main__":
    typer.run(main)
