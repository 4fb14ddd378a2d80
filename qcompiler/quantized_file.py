"""Write a model as the quantizer leaves it: ONNX that other runtimes load."""

import os
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from qcompiler.compile import SILENT, Progress, prepare
from qcompiler.errors import QCompilerError
from qcompiler.graph import nodes_of
from qcompiler.onnx_file import external_files
from qcompiler.options import Options, WeightOperators
from qcompiler.passes.rewrite_matmul_nbits import OP_TYPE, ExportMatMulNBits
from qcompiler.passes.rewrite_qlinear import MICROSOFT
from qcompiler.pipeline import harmonize, run_passes
from qcompiler.quant.quantize import quantize

LARGEST_FILE = 1 << 31
"""Bytes of one protobuf; larger models keep their weights in a file beside it."""


@dataclass(frozen=True)
class WrittenModel:
    """What was written."""

    path: Path
    bytes: int
    """Of the file, and of the weights beside it if there are so many."""
    float_bytes: int
    """Of the model as it was given, likewise."""
    quantize_linear: int
    """How many tensors are quantized at run time."""
    integer_weights: int
    """How many constants are stored as integers."""
    matmul_nbits: int

    def summary(self) -> str:
        parts = [f"{self.integer_weights} weights stored as integers", f"{self.quantize_linear} tensors quantized"]
        if self.matmul_nbits:
            parts[0] = f"{self.matmul_nbits} MatMulNBits, {parts[0]}"
        smaller = f"{self.bytes / 1e6:.2f} MB, {self.bytes / self.float_bytes:.0%} of the model given"
        return f"wrote {self.path}: {', '.join(parts)}; {smaller}"


def quantize_file(
    model: str | os.PathLike[str],
    target: str | os.PathLike[str],
    options: Options,
    output: Path,
    operators: WeightOperators = "matmulnbits",
    *,
    progress: Progress = SILENT,
) -> WrittenModel:
    """Quantize a model as `compile` would and write it instead of building it.

    Args:
        model: the ONNX file.
        target: its spec says which formats there are.
        options: as of `compile`.
        output: the file to write, replaced if it exists; weights beyond 2 GB go beside it.
        operators: products with weights in groups become com.microsoft's MatMulNBits, or stay DequantizeLinear
            (block_size) and Gemm.

    Raises:
        QCompilerError: as of `compile`, or the file cannot be written.
    """
    prepared = prepare(model, target, options, progress)
    progress.stage("quantize")
    graph = prepared.graph if prepared.plan is None else quantize(prepared.graph, prepared.plan)
    graph = run_passes(graph, harmonize(prepared.target), stage="harmonize")
    if operators == "matmulnbits":
        ExportMatMulNBits()(graph)
    progress.stage("write")
    return write_model(graph, Path(model), output)


def write_model(model: ir.Model, source: Path, output: Path) -> WrittenModel:
    """Write what was made of the file `source`. Raises QCompilerError if that cannot be done."""
    graph = model.graph
    stored = {value: value.const_value for value in graph.initializers.values() if value.const_value is not None}
    large = sum(tensor.nbytes for tensor in stored.values()) >= LARGEST_FILE
    beside = f"{output.name}.data" if large else None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        ir.save(model, output, external_data=beside)
        size = output.stat().st_size + ((output.parent / beside).stat().st_size if beside else 0)
    except OSError as error:
        raise QCompilerError(f"cannot write {output}: {error.strerror}.") from None
    onnx.checker.check_model(str(output))
    integers = [node for node in nodes_of(graph, "DequantizeLinear") if node.inputs[0] in stored]
    products = nodes_of(graph, OP_TYPE, domain=MICROSOFT)
    return WrittenModel(
        output,
        size,
        source.stat().st_size + sum(file.stat().st_size for file in external_files(source)),
        len(nodes_of(graph, "QuantizeLinear")),
        len(integers) + len(products),
        len(products),
    )
