"""An integer region as a TOSA 1.1 function, whose RESCALEs carry our multipliers and shifts as they are.

`tosa_of` writes MLIR text and needs nothing; `serialize` turns it into a .tosa file with `tosa-opt` of the package
tosa-tools. All tensors are int8: uint8 ones are held with 128 subtracted, and converted at the region's border.

RESCALE with DOUBLE_ROUND is our ``tflite`` arithmetic, and TFLite's: for p = value * multiplier both are
``floor((floor((p ± 2^30) / 2^31) + 2^(e-1)) / 2^e)``, the sign that of the value. With SINGLE_ROUND it is ``tosa``.

Source: the TOSA 1.0 specification, https://www.mlplatform.org/tosa/tosa_spec.html.
"""

import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx_ir as ir

from qcompiler import tools
from qcompiler.emit.nodes import emit_nodes
from qcompiler.emit.tosa_elementwise import emit_add, emit_clip, emit_lookup, emit_mul, emit_requantize, emit_softmax
from qcompiler.emit.tosa_emitter import Emitter, refusal
from qcompiler.emit.tosa_movement import emit_concat, emit_pad, emit_reshape, emit_slice, emit_split, emit_transpose
from qcompiler.emit.tosa_pools import emit_average_pool, emit_max_pool, emit_reduce_mean
from qcompiler.emit.tosa_products import emit_conv, emit_conv_transpose, emit_gemm, emit_matmul
from qcompiler.emit.tosa_resize import emit_resize_linear, emit_resize_nearest
from qcompiler.errors import QCompilerError
from qcompiler.integer.formats import EIGHT_BITS
from qcompiler.partition import Region

_EMITTERS: Mapping[str, Callable[[Emitter, ir.Node], None]] = {
    "QConv": emit_conv,
    "QConvTranspose": emit_conv_transpose,
    "QGemm": emit_gemm,
    "QMatMul": emit_matmul,
    "QAdd": emit_add,
    "QMul": emit_mul,
    "QMaxPool": emit_max_pool,
    "QAveragePool": emit_average_pool,
    "QReduceMean": emit_reduce_mean,
    "QRequantize": emit_requantize,
    "QLookup": emit_lookup,
    "QSoftmax": emit_softmax,
    "QResizeNearest": emit_resize_nearest,
    "QResizeLinear": emit_resize_linear,
    "Reshape": emit_reshape,
    "Flatten": emit_reshape,
    "Squeeze": emit_reshape,
    "Unsqueeze": emit_reshape,
    "Identity": emit_reshape,
    "Transpose": emit_transpose,
    "Concat": emit_concat,
    "Slice": emit_slice,
    "Split": emit_split,
    "Pad": emit_pad,
    "Clip": emit_clip,
}


def tosa_of(region: Region) -> str:
    """The MLIR text. Inputs and outputs are those of the region, in its order and layout; uint8 is typed i8.

    Raises:
        QCompilerError: an operator that TOSA cannot compute the way the integer graph does.
    """
    emitter = Emitter(region)
    emit_nodes(region, emitter, _EMITTERS, "TOSA", refusal, EIGHT_BITS)
    return emitter.module(region)


def serialize(text: Path) -> Path:
    """Turn FILE.mlir into FILE.tosa beside it.

    Raises:
        QCompilerError: tosa-tools is not installed, or refuses the file.
    """
    program = tosa_program("tosa-opt")
    file = text.with_suffix(".tosa")
    command = [program, f"--tosa-serialize=tosa-flatbuffer-filename={file}", str(text), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not file.exists():
        raise QCompilerError(f"tosa-opt cannot serialize {text}: {done.stderr.strip()[:500]}")
    return file


def tosa_program(name: str) -> str:
    """A program of tosa-tools. Raises QCompilerError if it is not installed."""
    return tools.require(
        name,
        purpose="to write TOSA",
        install="python3 -m venv tosa && tosa/bin/pip install tosa-tools (an environment of its own: it wants an old "
        "numpy)",
        beside_python=True,
    )
