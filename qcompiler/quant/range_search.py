"""Choose among ranges of a tensor by the error each brings to the outputs of the layers that read it."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.graph import const_of, data_input, is_op, users, value_name
from qcompiler.quant.layer_rows import has_rows, input_rows, weight_rows
from qcompiler.quant.moments import Sample, Tap
from qcompiler.quant.operators import MAC_OPS
from qcompiler.quant.types import Range

SAMPLES = 16
"""Samples to compare by: the ranges themselves come from all of them."""
ROWS = 128
"""Rows of a layer's input that enter the comparison, per sample."""


def search_ranges(
    model: ir.Model,
    candidates: Mapping[str, Sequence[Range]],
    samples: Iterable[Sample],
    bits: int,
    *,
    symmetric: bool,
) -> dict[str, Range]:
    """For each tensor the candidate with the least squared error in what its readers make of it.

    Readers are convolutions and products with constant weights; their errors count relative to the power of their
    outputs. A tensor without such a reader is judged by its own error.

    Args:
        model: the float model.
        candidates: by value name; those with a single candidate cost nothing.
        samples: each is run once.
        bits: width of the activation format.
        symmetric: whether its zero point is in the middle.
    """
    open_ = {name: ranges for name, ranges in candidates.items() if len(ranges) > 1}
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    readers = {value_name(v): _readers(v) for v in values if v.name in open_}
    errors = {name: np.zeros(len(ranges)) for name, ranges in open_.items()}
    tap = Tap(model, list(open_))
    for index, sample in enumerate(samples):
        tensors = tap.run(sample)
        for name, ranges in open_.items():
            rows = [(input_rows(node, tensors[name], ROWS, index), weights) for node, weights in readers[name]]
            for position, chosen in enumerate(ranges):
                errors[name][position] += _error(tensors[name], rows, chosen, bits, symmetric=symmetric)
    return {
        name: ranges[int(np.argmin(errors[name]))] if name in open_ else ranges[0]
        for name, ranges in candidates.items()
    }


def _readers(value: ir.Value) -> list[tuple[ir.Node, np.ndarray]]:
    """Layers that multiply the value by constant weights, and these as [groups, K, M]."""
    found = []
    for node in users(value):
        weights = const_of(data_input(node, 1)) if is_op(node, *MAC_OPS) else None
        if weights is not None and data_input(node) is value and has_rows(node):
            found.append((node, weight_rows(node, weights).transpose(0, 2, 1)))
    return found


def _error(
    tensor: np.ndarray, rows: Sequence[tuple[np.ndarray, np.ndarray]], chosen: Range, bits: int, *, symmetric: bool
) -> float:
    if not rows:
        return float(np.square(_rounded(tensor, chosen, bits, symmetric=symmetric) - tensor).mean(dtype=np.float64))
    total = 0.0
    for inputs, weights in rows:
        # Padding is zero, which every range represents exactly.
        off = (_rounded(inputs, chosen, bits, symmetric=symmetric) - inputs) @ weights
        power = float(np.square(inputs @ weights).mean(dtype=np.float64))
        total += float(np.square(off).mean(dtype=np.float64)) / max(power, 1e-30)
    return total


def _rounded(x: np.ndarray, chosen: Range, bits: int, *, symmetric: bool) -> np.ndarray:
    """What quantizing and dequantizing leaves of x."""
    if symmetric:
        last = 2 ** (bits - 1) - 1
        step = max(-chosen.low, chosen.high) / last
        return x if step == 0 else np.clip(np.rint(x / step), -last, last) * step
    step = (chosen.high - chosen.low) / (2**bits - 1)
    zero = np.rint(-chosen.low / step) if step else 0.0
    return x if step == 0 else (np.clip(np.rint(x / step) + zero, 0, 2**bits - 1) - zero) * step
