"""A hardware-aware quantizing compiler: ONNX in, INT8 code for a chip described in YAML out.

>>> bundle = qcompiler.compile("model.onnx", target="arm-npu", calibration="samples.npz")
>>> outputs = bundle.run({"image": images})
"""

from qcompiler.bundle import Bundle, load
from qcompiler.compile import compile
from qcompiler.errors import QCompilerError

__all__ = ["Bundle", "QCompilerError", "compile", "load"]
