"""onnxruntime as a reference: it rounds where the graph rounds, and its integer sums are exact.

Left to itself it replaces QDQ operators by integer kernels with roundings of their own. On x86 CPUs without VNNI those
kernels, and QLinearConv, MatMulInteger and the like where a model has them, multiply uint8 by int8 with `vpmaddubsw`,
whose sums of two products saturate at 16 bits. `session.x64quantprecision` avoids that, from the extended optimizations
on (kOrtSessionOptionsAvx2PrecisionMode in onnxruntime_session_options_config_keys.h).
"""

from pathlib import Path

import onnx
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as HasNoKernel

INTEGER_PRODUCTS = frozenset(
    {
        "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "QGemm", "QAttention",
        "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "DynamicQuantizeLSTM",
    }
)  # fmt: skip
"""Standard and com.microsoft operators that have such kernels."""

ROUNDS_WEIGHTS = "WeightBiasQuantization"
"""A rewrite of onnxruntime that rounds float weights between quantized activations to eight bits per tensor: what was
left in float would not be."""


def exact_session(model: bytes | Path, *, optimize: bool = True, spinning: bool = True) -> ort.InferenceSession:
    """A session on the CPU.

    Args:
        model: an ONNX model, or its file.
        optimize: let onnxruntime fold constants and drop what does nothing. A model with integer products is
            optimized further where that makes its sums exact.
        spinning: whether its threads wait for work by spinning, which takes cores from what runs between calls.
    """
    plain = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC if optimize else ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if _multiplies_integers(model):
        try:
            return _session(model, ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED, spinning, precise=True)
        except HasNoKernel:
            # Products of int8 by int8, exact as they are, become some that onnxruntime 1.32 has no kernels for.
            return _session(model, plain, spinning, precise=False)
    return _session(model, plain, spinning, precise=False)


def _session(
    model: bytes | Path, level: ort.GraphOptimizationLevel, spinning: bool, *, precise: bool
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = level
    if precise:
        options.add_session_config_entry("session.x64quantprecision", "1")
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(
        model, options, providers=["CPUExecutionProvider"], disabled_optimizers=[ROUNDS_WEIGHTS]
    )


def _multiplies_integers(model: bytes | Path) -> bool:
    if isinstance(model, bytes):
        proto = onnx.ModelProto.FromString(model)
    else:
        proto = onnx.load(model, load_external_data=False)
    functions = (function.node for function in proto.functions)
    return any(node.op_type in INTEGER_PRODUCTS for nodes in (proto.graph.node, *functions) for node in nodes)
