"""Race our float CPU code against ONNX Runtime and OpenVINO on the same float networks.

    python benchmarks/cpu_float.py          # pip install -e '.[bench]'; all networks, writes results/cpu-float.md
    python benchmarks/cpu_float.py --only squeezenet --rounds 3

`qcompile --float all` keeps every layer in float32. Engines run as in `cpu.py`, each in a process of its own, in turns;
OpenVINO is told to compute in single precision too.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from cpu import DEFAULT_ZOO, RESULTS, Row, Turns, cpu_name, race, source_of, table, threaded
from cpu_engines import Engine
from rich.console import Console

import qcompiler

NETWORKS = ("resnet20", "squeezenet11", "mobilenet_v2", "resnet_50")
ENGINES: tuple[Engine, ...] = ("qcompiler", "onnxruntime", "openvino")
PACKAGES: Mapping[Engine, str] = {"onnxruntime": "onnxruntime", "openvino": "openvino"}
AGREEMENT = 1e-3
"""Largest distance of outputs from ONNX Runtime's, relative to their norm."""


def main(
    only: Annotated[str, typer.Option(help="networks whose name contains this")] = "",
    threads: Annotated[list[int] | None, typer.Option(help="thread counts; 1 and 2 if not given")] = None,
    rounds: Annotated[int, typer.Option(help="times each engine gets its turn")] = 6,
    seconds: Annotated[float, typer.Option(help="length of a turn")] = 0.5,
    target: Annotated[str, typer.Option(help="the CPU target to compile for")] = "x86-cpu",
    zoo: Annotated[Path, typer.Option(help="folder of models")] = DEFAULT_ZOO,
) -> None:
    """Build, check, measure; print the table, and write it if no network was left out."""
    console = Console(width=160)
    rows: list[tuple[Row, float]] = []
    with TemporaryDirectory(prefix="cpu-float-benchmark-") as temporary:
        work = Path(temporary)
        for network in NETWORKS:
            if only not in network:
                continue
            source = source_of(network, zoo, work)
            for count in threads or [1, 2]:
                start = time.perf_counter()
                bundle = qcompiler.compile(source, threaded(target, count, work), keep_float=["all"])
                compiling = time.perf_counter() - start
                peers: dict[Engine, Path] = {"onnxruntime": source, "openvino": source}
                row = race(network, bundle, peers, count, Turns(rounds, seconds), AGREEMENT, single_precision=True)
                rows.append((row, compiling))
                console.print(" | ".join(_cells(row, compiling)), highlight=False)
    text = _markdown(rows)
    console.print(text, markup=False, highlight=False)
    if not only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "cpu-float.md").write_text(text)


def _cells(row: Row, compiling: float) -> list[str]:
    def cell(engine: Engine) -> str:
        item = row.times.get(engine)
        return f"{item.minimum:.3f} / {item.median:.3f}" if item else "-"

    ours = row.times["qcompiler"].minimum
    return [
        row.network,
        str(row.threads),
        *map(cell, ENGINES),
        f"**{ours / row.times['onnxruntime'].minimum:.2f}**",
        f"{row.ratio():.2f}",
        f"{row.macs / ours / 1e6:.0f}",
        f"{row.distances['qcompiler']:.1e}",
        f"{compiling:.1f}",
    ]


def _markdown(rows: Sequence[tuple[Row, float]]) -> str:
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES.values())
    text = f"""# Float CPU code beside ONNX Runtime and OpenVINO

`python benchmarks/cpu_float.py {" ".join(sys.argv[1:])}`, {date.today()}, {cpu_name()}; {packages}.

Every layer in float32 (`--float all`). Milliseconds a run, minimum / median; ratios of minima, to ONNX Runtime and to
the faster of the two; *distance*: of our outputs from ONNX Runtime's, relative to their norm.

"""
    header = ["network", "threads", *ENGINES, "to onnxruntime", "to the best", "GMAC/s", "distance", "compile s"]
    return text + table(header, [_cells(row, compiling) for row, compiling in rows])


if __name__ == "__main__":
    typer.run(main)
