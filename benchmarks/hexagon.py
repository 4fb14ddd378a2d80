"""Hexagon: what the vector unit (HVX) gains, layer by layer, and the zoo's networks, counted in an emulator.

    python benchmarks/hexagon.py -o benchmarks/results/hexagon.md [--samples 20]

Needs clang, lld, llvm and qemu-user-static, and for the networks the model zoo (QCOMPILER_ZOO). Every layer and network
is compared with the numpy reference before it is counted.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx_ir as ir
import typer
from mcu import CALIBRATION_SAMPLES, MODELS, NETWORK_HEADER, facts, inputs_of, make, missing, network_row, placed

from qcompiler.backends import mcu
from qcompiler.backends.base import host_code
from qcompiler.backends.mcu_emit import TestVector, write_c
from qcompiler.backends.mcu_functions import generate
from qcompiler.graph import value_name
from qcompiler.integer import ops
from qcompiler.integer.reference import execute
from qcompiler.quant import arithmetic
from qcompiler.target import Target
from qcompiler.target_loader import load_target

VECTOR, SCALAR = "hexagon-dsp", "hexagon-scalar"
LAYER_HEADER = (
    "| layer | MACs | vrmpy in the code | HVX | scalar | scalar / HVX | HVX per MAC | scalar per MAC |",
    "|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Layer:
    """A convolution [H, W, C] to `channels`, all int8."""

    name: str
    x: tuple[int, int, int]
    channels: int
    kernel: tuple[int, int]
    stride: int = 1
    group: int = 1

    @property
    def out(self) -> tuple[int, int]:
        pad = self.kernel[0] // 2 * 2
        rows, columns = ((size + pad - self.kernel[0]) // self.stride + 1 for size in self.x[:2])
        return rows, columns

    @property
    def macs(self) -> int:
        return self.out[0] * self.out[1] * self.channels * self.kernel[0] * self.kernel[1] * self.x[2] // self.group


LAYERS = (
    Layer("3×3, 64 → 64, 16×16", (16, 16, 64), 64, (3, 3)),
    Layer("1×1, 64 → 64, 16×16", (16, 16, 64), 64, (1, 1)),
    Layer("3×3, 16 → 16, 32×32", (32, 32, 16), 16, (3, 3)),
    Layer("3×3, 3 → 16, 32×32", (32, 32, 3), 16, (3, 3)),
    Layer("3×3 stride 2, 32 → 64, 16×16", (16, 16, 32), 64, (3, 3), stride=2),
    Layer("1×1, 128 → 256, 8×8", (8, 8, 128), 256, (1, 1)),
    Layer("fully connected, 256 → 1000", (1, 1, 256), 1000, (1, 1)),
    Layer("3×3 depthwise, 64, 16×16", (16, 16, 64), 64, (3, 3), group=64),
    Layer("3×3 depthwise stride 2, 64, 16×16", (16, 16, 64), 64, (3, 3), stride=2, group=64),
)


def layer_model(layer: Layer) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """The layer by itself, and a sample."""
    rng = np.random.default_rng(1)
    depth = layer.x[2] // layer.group
    reals = rng.uniform(0.2, 2, layer.channels) / (np.sqrt(depth * layer.kernel[0] * layer.kernel[1]) * 70)
    constants = [
        _value(f"c{index}", array)
        for index, array in enumerate(
            (
                rng.integers(-127, 128, (layer.channels, *layer.kernel, depth)).astype(np.int8),
                rng.integers(-3000, 3000, layer.channels).astype(np.int32),
                *arithmetic.multipliers(reals, "tosa"),
            )
        )
    ]
    sample = rng.integers(-128, 128, (1, *layer.x)).astype(np.int8)
    x = ir.Value(name="x", shape=ir.Shape(sample.shape), type=ir.TensorType(ir.DataType.INT8))
    shape = (1, *layer.out, layer.channels)
    y = ir.Value(name="y", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT8))
    pad, strides = layer.kernel[0] // 2, (layer.stride, layer.stride)
    op = ops.QConv(layer.kernel, strides, (pad, pad, pad, pad), (1, 1), layer.group, 3, 0, -7, -128, 127, "tosa")
    node = op.node([x, *constants], y, "layer")
    opsets = {"": 21, "qcompiler": ops.DOMAIN_VERSION}
    graph = ir.Graph([x], [y], nodes=[node], initializers=constants, opset_imports=opsets, name="layer")
    return ir.Model(graph, ir_version=10), {"x": sample}


def _value(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def counted(layer: Layer, target: Target, folder: Path) -> tuple[int, int]:
    """Instructions of one run, whose output must be the reference's, and vrmpy in the kernel's assembly."""
    model, sample = layer_model(layer)
    program = mcu.lower(model, target)
    values = execute(model, sample, [value_name(value) for value in (*model.graph.inputs, *model.graph.outputs)])
    folder.mkdir()
    write_c(folder, program, target.host, [TestVector((values["x"],), (values["y"],))])
    ran = facts(make(folder, "run"))
    assert ran["equal"] == 1, layer
    assembly = generate(program.module.module, host_code(target.host).target).inspect_source("asm")
    return ran["instructions"], assembly.count("vrmpy")


def layer_rows(work: Path) -> list[str]:
    rows: list[str] = []
    for index, layer in enumerate(LAYERS):
        vector, vrmpy = counted(layer, load_target(VECTOR), work / f"vector{index}")
        scalar, none = counted(layer, load_target(SCALAR), work / f"scalar{index}")
        assert none == 0
        rows.append(
            f"| {layer.name} | {layer.macs:,} | {vrmpy} | {vector:,} | {scalar:,} | {scalar / vector:.1f} | "
            f"{vector / layer.macs:.4f} | {scalar / layer.macs:.2f} |"
        )
        typer.echo(rows[-1])
    return rows


def network_rows(work: Path, zoo: Path, samples: int) -> list[str]:
    rows: list[str] = []
    for model, _ in MODELS:
        fed = inputs_of(zoo, model, CALIBRATION_SAMPLES + samples)
        for name, count in ((VECTOR, samples), (SCALAR, 1)):
            done = placed(zoo, model, name, fed[:CALIBRATION_SAMPLES])
            folder = work / f"{model}-{name}"
            folder.mkdir()
            rows.append(network_row(folder, model, done, fed[CALIBRATION_SAMPLES : CALIBRATION_SAMPLES + count]))
            typer.echo(rows[-1])
    return rows


def notes(samples: int) -> Sequence[str]:
    return (
        f"`python benchmarks/hexagon.py -o benchmarks/results/hexagon.md --samples {samples}`",
        "",
        "Instructions, as QEMU counts them in its control register c21 (`board_ticks`), between the call of the model "
        f"and its return, under qemu-hexagon. `{SCALAR}` is the same chip, compiler and counter without the vector "
        "unit. They are no cycles: a packet holds up to four instructions. Every output equals the numpy reference's.",
    )


def main(
    output: Annotated[Path, typer.Option("-o", help="The report to write.")],
    samples: Annotated[int, typer.Option(help="Per network; of the scalar build, one.")] = 20,
) -> None:
    zoo = Path(os.environ.get("QCOMPILER_ZOO", "../shared/zoo"))
    if (problem := missing(load_target(VECTOR))) is not None:
        raise SystemExit(problem)
    with tempfile.TemporaryDirectory() as work:
        layers = layer_rows(Path(work))
        networks = network_rows(Path(work), zoo, samples)
    text = ["# Hexagon", "", *notes(samples), "", *LAYER_HEADER, *layers, "", *NETWORK_HEADER, *networks, ""]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(text), "utf-8")


if __name__ == "__main__":
    typer.run(main)
