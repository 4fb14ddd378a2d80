"""Arm's Vela compiler: from a .tflite or .tosa network to an Ethos-U command stream, and its own estimate.

Vela is the package ethos-u-vela (extra `ethosu`), run as a program. What it makes of a region lies beside the region's
file: NAME_vela.tflite holds the command stream, NAME_per-layer.csv and NAME_summary.csv its performance estimate.
"""

import csv
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from qcompiler import tools
from qcompiler.errors import QCompilerError
from qcompiler.target import VelaConfig

_CONFIGURATIONS = "Arm/vela.ini"
_OUTPUT_SUFFIXES = ("_vela.tflite", "_vela.npz", "_per-layer.csv")
_KIB = 1024
_MESSAGE_LINES = 12


@dataclass(frozen=True)
class VelaResult:
    """What Vela says of one network."""

    cycles: int
    """Of one inference, memory accesses included."""
    scratchpad: int
    """Bytes of SRAM it uses."""
    npu_operators: int
    """Counted by Vela after it has rewritten the graph."""
    cpu_operators: int
    refusals: tuple[str, ...]
    """What it left to the CPU, with its reasons."""
    files: tuple[Path, ...]


def compile_network(network: Path, config: VelaConfig, folder: Path) -> VelaResult:
    """Run Vela on a .tflite or .tosa file and put what it writes into `folder`.

    Raises:
        QCompilerError: Vela is not installed, or fails.
    """
    with TemporaryDirectory(prefix="qcompiler-vela-") as scratch:
        command = [
            *_program(),
            str(network),
            f"--accelerator-config={config.accelerator}",
            f"--config={_CONFIGURATIONS}",
            f"--system-config={config.system_config}",
            f"--memory-mode={config.memory_mode}",
            f"--output-dir={scratch}",
            "--verbose-performance",
        ]
        # In the scratch folder, so that a file called ethosu.py where the user stands is not imported.
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)
        summaries = sorted(Path(scratch).glob(f"{network.stem}_summary_*.csv"))
        if done.returncode or not summaries:
            said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-_MESSAGE_LINES:])
            raise QCompilerError(f"Vela failed on {network.name} for {config.accelerator}:\n{said}")
        files = [Path(scratch) / f"{network.stem}{suffix}" for suffix in _OUTPUT_SUFFIXES]
        kept = [Path(shutil.copyfile(file, folder / file.name)) for file in files if file.exists()]
        kept.append(Path(shutil.copyfile(summaries[0], folder / f"{network.stem}_summary.csv")))
        return _read(summaries[0], done.stdout, tuple(kept))


def require_vela() -> None:
    """Raise QCompilerError unless Vela is installed: before time is spent on a model."""
    _program()


def _program() -> list[str]:
    if find_spec("ethosu") is not None:
        return [sys.executable, "-m", "ethosu.vela"]
    install = "pip install 'qcompiler[ethosu]'"
    return [tools.require("vela", purpose="to compile for an Ethos-U", install=install, beside_python=True)]


def _read(summary: Path, printed: str, files: tuple[Path, ...]) -> VelaResult:
    with summary.open(newline="", encoding="utf-8") as stream:
        row = next(csv.DictReader(stream))
    refusals = re.findall(
        r"^Warning \(supported operators\) operator: (\w+), ofm: '([^']*)'\nReason: (.+)", printed, re.MULTILINE
    )
    return VelaResult(
        cycles=int(float(row["cycles_total"])),
        scratchpad=round(float(row["sram_memory_used"]) * _KIB),
        npu_operators=_count(printed, "NPU"),
        cpu_operators=_count(printed, "CPU"),
        refusals=tuple(f"{op} {ofm!r}: {reason}" for op, ofm, reason in refusals),
        files=files,
    )


def _count(printed: str, where: str) -> int:
    found = re.search(rf"^{where} operators = (\d+)", printed, re.MULTILINE)
    assert found is not None, f"Vela does not count {where} operators"
    return int(found.group(1))
