"""Arm CPUs: zoo networks in user-mode emulation, checked, and their instructions counted beside plain C.

    python benchmarks/arm.py -o benchmarks/results/arm.md [--samples 5]

Needs the model zoo (QCOMPILER_ZOO), make, gcc, aarch64-linux-gnu-gcc, and qemu-aarch64, the dynamically linked
emulator, which takes plugins (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user).

Every column runs the same integer graph, quantized for `arm-cpu`. Plain C is what `tvm_target: {kind: c}` gives:
loops over channels, for GCC to make of what it can.
"""

import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from mcu import CALIBRATION_SAMPLES, Arrays, facts, inputs_of, make, missing, placed

from qcompiler.compile import Placed
from qcompiler.emit_c import write_placed
from qcompiler.target import Target
from qcompiler.target_loader import load_target

MODELS = ("mnist_cnn", "kws_dscnn", "resnet8_cifar10", "resnet20_cifar10", "mobilenet_v1_025_128", "squeezenet11")
QUANTIZED_FOR = "arm-cpu"


@dataclass(frozen=True)
class Build:
    """One column."""

    name: str
    target: Target
    flags: str
    """Of the C compiler, behind -O2 and those of the spec."""
    beside: int
    """Which column it is compared with: plain C for the same CPU."""


def builds() -> tuple[Build, ...]:
    chip = load_target(QUANTIZED_FOR)
    assert chip.host.bare_metal is not None
    any_cpu = chip.host.bare_metal.model_copy(update={"flags": ()})
    host = chip.host.model_copy(update={"tvm_target": {"kind": "c"}, "bare_metal": any_cpu})
    plain = chip.model_copy(update={"host": host})
    return (
        Build("C, gcc -O2", plain, "", 0),
        Build("C, gcc -O3", plain, "-O3", 0),
        Build("C, gcc -O3 -mcpu=cortex-a76", plain, "-O3 -mcpu=cortex-a76", 0),
        Build("`arm-cpu-neon`", load_target("arm-cpu-neon"), "", 1),
        Build("`arm-cpu`", chip, "", 2),
        Build("`arm-cpu-i8mm`", load_target("arm-cpu-i8mm"), "", 2),
    )


def counting_emulator(target: Target, work: Path) -> str:
    """The emulator's command line with the counting plugin, compiled into `work`."""
    chip = target.host.bare_metal
    assert chip is not None
    plugin = work / "count.so"
    source = Path(__file__).with_name("qemu_count.c")
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(plugin)], check=True)
    return " ".join([chip.emulator[0].removesuffix("-static"), "-plugin", str(plugin), *chip.emulator[1:]])


def instructions(done: Placed, build: Build, samples: Sequence[Arrays], work: Path) -> int:
    """Per sample: what a run with all samples takes more than one with the first, comparing included."""
    emulator, totals = counting_emulator(build.target, work), []
    for count in (1, len(samples)):
        with tempfile.TemporaryDirectory() as folder:
            write_placed(Path(folder), replace(done, target=build.target), samples[:count])
            ran = facts(make(Path(folder), "run", f"EMULATOR={emulator}", f"CFLAGS_EXTRA={build.flags}"))
        assert ran["equal"] == count, (build.name, ran)
        totals.append(ran["total"])
    return (totals[1] - totals[0]) // (len(samples) - 1)


def main(
    output: Annotated[Path, typer.Option("-o", help="The report to write.")],
    samples: Annotated[int, typer.Option(min=2)] = 5,
    models: Annotated[str, typer.Option(help="Commas between.")] = ",".join(MODELS),
) -> None:
    zoo, columns = Path(os.environ.get("QCOMPILER_ZOO", "../shared/zoo")), builds()
    if (problem := missing(columns[0].target)) is not None:
        raise SystemExit(problem)
    rows = [f"| model | {' | '.join(build.name for build in columns)} | fewer |", "|---" * (len(columns) + 2) + "|"]
    with tempfile.TemporaryDirectory() as work:
        for model in models.split(","):
            fed = inputs_of(zoo, model, CALIBRATION_SAMPLES + samples)
            done = placed(zoo, model, QUANTIZED_FOR, fed[:CALIBRATION_SAMPLES])
            counts = [instructions(done, build, fed[CALIBRATION_SAMPLES:], Path(work)) for build in columns]
            ratios = (counts[build.beside] / count for build, count in zip(columns[3:], counts[3:], strict=True))
            fewer = ", ".join(f"{ratio:.1f}" for ratio in ratios)
            rows.append(f"| {model} | {' | '.join(f'{count:,}' for count in counts)} | {fewer} |")
            typer.echo(rows[-1])
    notes = [
        "# Arm CPUs: instructions per inference",
        "",
        f"`python benchmarks/arm.py -o benchmarks/results/arm.md --samples {samples}`",
        "",
        "Counted by a plugin of qemu-aarch64 -cpu max (`benchmarks/qemu_count.c`): every instruction the program "
        "executes, comparing with the reference included, as what a run with all samples takes more than a run with "
        "one. All columns run one integer graph and give the numpy reference's integers, bit for bit. Plain C is the "
        "same graph from TVM's C generator, built by aarch64-linux-gnu-gcc for any Armv8-A, or for a Cortex-A76, where "
        "GCC finds sdot itself. The last column is how many times fewer instructions `arm-cpu-neon` takes than C at "
        "-O3, and `arm-cpu` and `arm-cpu-i8mm` than C at -O3 for the Cortex-A76. Instructions are not cycles.",
        "",
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join([*notes, *rows, ""]), "utf-8")


if __name__ == "__main__":
    typer.run(main)
