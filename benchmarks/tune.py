"""What `qcompile tune` gains: all distinct CPU kernels of each network, with guessed and with measured tiles.

    python benchmarks/tune.py -o benchmarks/results/tune.md [--threads 1,2] [--models …]

Needs the model zoo (QCOMPILER_ZOO). Measures anew, into a database of its own.
"""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from qcompiler.options import Options
from qcompiler.tune import tune

MODELS = ("kws_dscnn", "resnet8_cifar10", "resnet20_cifar10", "mobilenet_v1_025_128", "squeezenet11", "fastestdet_352")


def main(
    output: Annotated[Path, typer.Option("-o", help="The report to write.")],
    threads: Annotated[str, typer.Option(help="Commas between.")] = "1,2",
    models: Annotated[str, typer.Option(help="Commas between.")] = ",".join(MODELS),
    target: str = "x86-cpu",
) -> None:
    zoo = Path(os.environ.get("QCOMPILER_ZOO", "../shared/zoo"))
    rows = ["| model | threads | kernels | better tile | guessed, ms | tuned, ms | gain |", "|---" * 7 + "|"]
    for model in models.split(","):
        for count in threads.split(","):
            with tempfile.TemporaryDirectory() as folder:
                options = Options(overrides=[f"host.threads={count}"])
                found = tune(zoo / "models" / f"{model}.onnx", target, options, database=Path(folder) / "tiles.json")
            times = f"{found.guessed_seconds * 1e3:.3f} | {found.seconds * 1e3:.3f}"
            gain = f"{1 - found.seconds / found.guessed_seconds:.1%}"
            rows.append(f"| {model} | {count} | {found.workloads} | {found.changed} | {times} | {gain} |")
            typer.echo(rows[-1])
    notes = [
        "# Tuning",
        "",
        f"`python benchmarks/tune.py -o benchmarks/results/tune.md --threads {threads} --models {models}`",
        "",
        "Distinct kernels with tiles to choose from, once each, the quickest of some dozens of runs; what else a "
        "network does, depthwise convolutions, pools and sums of maps, is not in these times.",
        "",
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join([*notes, *rows, ""]), "utf-8")


if __name__ == "__main__":
    typer.run(main)
