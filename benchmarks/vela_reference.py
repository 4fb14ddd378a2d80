"""What Arm's Vela compiler reports of a network, operator by operator, from its debug database.

Vela is run as a program, so that it may live in an environment of its own: `pip install ethos-u-vela==5.2.0`.
"""

import csv
import io
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from qcompiler.simulator.workload import Dims, OpClass, Shape

MEMORY_MODE = "Shared_Sram"

_CLASSES: Mapping[str, OpClass] = {
    "Conv2D": "conv",
    "FullyConnected": "conv",
    "DepthwiseConv2D": "depthwise",
    "MaxPool": "max_pool",
    "AvgPool": "average_pool",
    "Add": "add",
    "Sub": "add",
    "Mul": "mul",
    "Quantize": "requantize",
    "Rescale": "requantize",
    "MemoryCopy": "requantize",
    "LUT": "lookup",
}
"""Operations the simulator has as well; softmaxes arrive in pieces, of which some count here."""
_BITS = {"Int8": 8, "UInt8": 8, "Int16": 16, "Int32": 32}

Row = Mapping[str, str]


@dataclass(frozen=True)
class Operator:
    """An operation as Vela scheduled it."""

    name: str
    """Of its output tensor."""
    kind: str
    """Vela's word for it."""
    shape: Shape | None
    """None for operations the simulator has no command for."""
    block: Dims
    npu_cycles: int
    """Vela's estimate, waiting for weights included, accesses to slow memory apart."""
    op_cycles: int
    """The longer of that and of the accesses."""
    scales_staged: bool
    """Whether weights and scales were copied to SRAM beforehand."""


@dataclass(frozen=True)
class Network:
    operators: tuple[Operator, ...]
    total_cycles: int
    npu_cycles: int
    sram_bytes: int


def run(vela: Path, tflite: bytes, accelerator: str, system: str, arena: int) -> Network:
    """Compile a network for an accelerator ("ethos-u55-128") in a system of Vela's, with so many bytes of SRAM."""
    with TemporaryDirectory(prefix="vela-") as folder:
        model = Path(folder) / "network.tflite"
        model.write_bytes(tflite)
        subprocess.run(
            [str(vela), str(model), "--accelerator-config", accelerator, "--system-config", system, "--memory-mode",
             MEMORY_MODE, "--config", "Arm/vela.ini", "--arena-cache-size", str(arena), "--verbose-performance",
             "--enable-debug-db", "--output-dir", folder],
            check=True, capture_output=True,
        )  # fmt: skip
        tables = _tables((Path(folder) / "network_debug.xml").read_text())
        (summary,) = csv.DictReader(next(Path(folder).glob("network_summary_*.csv")).open())
    return Network(
        _operators(tables),
        total_cycles=int(summary["cycles_total"]),
        npu_cycles=int(summary["cycles_npu"]),
        sram_bytes=round(float(summary["sram_memory_used"]) * 1024),
    )


def _tables(text: str) -> dict[str, list[dict[str, str]]]:
    found = re.finditer(r'<table name="([^"]+)">\s*<!\[CDATA\[(.*?)\]\]>', text, re.DOTALL)
    return {match.group(1): list(csv.DictReader(io.StringIO(match.group(2).strip()))) for match in found}


def _operators(tables: Mapping[str, list[dict[str, str]]]) -> tuple[Operator, ...]:
    details = {row["id"]: row for row in tables["perf_debug"]}
    prices = {row["id"]: row for row in tables["perf"]}
    blocks = {row["id"]: row for row in tables["perf_debug_main"]}
    return tuple(
        Operator(
            name=price["name"],
            kind=price["operator"],
            shape=_shape(price["operator"], details[index]),
            block=_dims(blocks[index], "ofm_block"),
            npu_cycles=int(price["npu_cycles"]),
            op_cycles=int(price["op_cycles"]),
            scales_staged=details[index]["weight_buffering"] not in ("", "None"),
        )
        for index, price in prices.items()
        if index in blocks
    )


def _shape(kind: str, row: Row) -> Shape | None:
    op = _CLASSES.get(kind)
    if op is None or row["ifm_dtype"] not in ("Int8", "UInt8", "Int16"):
        return None
    ifm, ofm, second = _map(row, "ifm"), _map(row, "ofm"), _map(row, "ifm2")

    def pair(name: str) -> tuple[int, int]:
        return int(row[f"kernel_{name}_y"]), int(row[f"kernel_{name}_x"])

    return Shape(
        op,
        ofm,
        ifm,
        pair("size"),
        pair("stride"),
        pair("dilation"),
        ifm[2] if op == "depthwise" else 1,
        _BITS[row["ifm_dtype"]],
        _BITS[row["ofm_dtype"]],
        8,
        1,
        second if any(second) else None,
        2.0 if "Sparse2_4" in row["weight_format"] else 1.0,
    )


def _map(row: Row, name: str) -> Dims:
    """The slice that is read or written, or the whole."""
    part = _dims(row, f"{name}_slice")
    return part if any(part) else _dims(row, f"{name}_shape")


def _dims(row: Row, name: str) -> Dims:
    height, width, depth = (int(row[f"{name}_{axis}"] or 0) for axis in "hwc")
    return height, width, depth
