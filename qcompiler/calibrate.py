"""Run the float model over calibration data and choose the interval each activation is quantized to."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Protocol

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from qcompiler.errors import QCompilerError
from qcompiler.graph import const_of, data_input, integer, is_op, only_user, value_name
from qcompiler.quant.bias_correction import input_channel_axis
from qcompiler.quant.operators import MAC_OPS, inherits_format, interior_values, is_activation
from qcompiler.quant.range_search import SAMPLES, search_ranges
from qcompiler.quant.ranges import (
    Histogram,
    averaged_range,
    entropy_range,
    mse_range,
    observed_range,
    percentile_range,
    with_headroom,
)
from qcompiler.quant.types import Range, RangeMethod, Ranges

Progress = Callable[[int, int], None]
"""Called with (samples done, samples in all)."""


class Samples(Protocol):
    """What calibration needs of a data set: one sample at a time, batch 1, arrays by input name."""

    @property
    def synthetic(self) -> bool: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]: ...


def calibrate(
    model: ir.Model,
    dataset: Samples,
    method: RangeMethod = "mse",
    progress: Progress | None = None,
    *,
    bits: int = 8,
    symmetric: bool = False,
) -> Ranges:
    """Observe the activations of a simplified float model.

    Args:
        model: float model with static shapes and batch 1.
        dataset: the samples; each is run once.
        method: "minmax" spans all values seen; "moving_average" averages the samples' extremes; "percentile" leaves out
            the outermost 0.01%; "entropy" minimises the loss of information; "mse" clips outliers where that lowers the
            expected squared error of the format described by `bits` and `symmetric`; "auto" measures for each tensor
            which of these serves the operators reading it best. With the last two, what only a Softmax reads is
            weighted by probability. Of 16 bits, both leave room for values larger than those seen.
        progress: told after each sample.
        bits: width of the activation format.
        symmetric: whether the activation format has its zero point in the middle.

    Returns:
        A range, zero included, for each tensor that `observed_values` names.

    Raises:
        QCompilerError: there is no sample, or a tensor of the model comes out as NaN.
    """
    ranged = [value_name(value) for value in observed_values(model)]
    products = {} if dataset.synthetic else _products(model)
    logits = _logits(model) if method in ("mse", "auto") else {}
    fed = {value_name(value) for value in model.graph.inputs}
    seen_elsewhere = [name for name, _ in (*products.values(), *logits.values())]
    computed = [name for name in dict.fromkeys([*ranged, *seen_elsewhere]) if name not in fed]
    session = _session(model, computed) if computed else None
    histograms = {name: Histogram() for name in ranged}
    sums: dict[tuple[str, int], np.ndarray] = {}
    seen = 0
    for seen, sample in enumerate(dataset, start=1):
        outputs = session.run(computed, dict(sample)) if session is not None else []
        tensors = {name: np.asarray(output) for name, output in zip(computed, outputs, strict=True)} | dict(sample)
        for name, histogram in histograms.items():
            if name in logits:
                moved, axis = logits[name]
                histogram.add(tensors[moved], histogram=True, weights=_softmax_weights(tensors[moved], axis))
            else:
                histogram.add(tensors[name], histogram=method not in ("minmax", "moving_average"))
            if np.isnan(histogram.low):
                raise QCompilerError(
                    f"calibration sample {seen - 1} makes the tensor {name!r} NaN in the float model; "
                    "remove the sample, or check that it is preprocessed as the model expects"
                )
        for name, axis in dict.fromkeys(products.values()):
            array = tensors[name]
            others = tuple(index for index in range(array.ndim) if index != axis)
            sums[name, axis] = sums.get((name, axis), 0.0) + array.mean(axis=others, dtype=np.float64)
        if progress is not None:
            progress(seen, len(dataset))
    if seen == 0:
        raise QCompilerError("the calibration data holds no sample; give at least one")
    if method == "auto":
        candidates = {
            name: _candidates(histogram, bits, symmetric=symmetric)
            for name, histogram in histograms.items()
            if name not in logits
        }
        searched = search_ranges(model, candidates, islice(dataset, SAMPLES), bits, symmetric=symmetric)
    else:
        searched = {}
    fallback: RangeMethod = "mse" if method == "auto" else method
    means = {node: sums[key] / seen for node, key in products.items()}
    by_name = {
        name: searched.get(name) or _range(histogram, fallback, bits, symmetric=symmetric)
        for name, histogram in histograms.items()
    }
    if bits > 8 and method in ("mse", "auto"):
        by_name = {name: with_headroom(chosen) for name, chosen in by_name.items()}
    return Ranges(
        by_name=by_name,
        method=method,
        samples=seen,
        synthetic=dataset.synthetic,
        channel_means={node: mean for node, mean in means.items() if np.isfinite(mean).all()},
    )


def _range(histogram: Histogram, method: RangeMethod, bits: int, *, symmetric: bool) -> Range:
    match method:
        case "minmax":
            return observed_range(histogram)
        case "moving_average":
            return averaged_range(histogram)
        case "percentile":
            return percentile_range(histogram)
        case "entropy":
            return entropy_range(histogram, bits, symmetric=symmetric)
        case _:
            return mse_range(histogram, bits, symmetric=symmetric)


def _candidates(histogram: Histogram, bits: int, *, symmetric: bool) -> list[Range]:
    """What "auto" tries, the most likely winner first."""
    methods: tuple[RangeMethod, ...] = ("mse", "minmax", "percentile", "entropy")
    return list(dict.fromkeys(_range(histogram, method, bits, symmetric=symmetric) for method in methods))


_REARRANGING = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity")


def _logits(model: ir.Model) -> dict[str, tuple[str, int]]:
    """Tensors that only a Softmax reads, perhaps rearranged first: what it reads, and along which axis it runs."""
    found: dict[str, tuple[str, int]] = {}
    for node in model.graph:
        value = data_input(node) if is_op(node, "Softmax") else None
        if value is None or not is_activation(value):
            continue
        root, only = value, only_user(value) is not None
        while only and is_op(root.producer(), *_REARRANGING):
            root = data_input(root.producer() or node)
            only = only_user(root) is not None
        if only:
            found[value_name(root)] = (value_name(value), integer(node, "axis", -1))
    return found


def _softmax_weights(logits: np.ndarray, axis: int) -> np.ndarray:
    """How much an error in each logit matters: as much as the probability it stands for, relative to the largest."""
    return np.exp(logits - logits.max(axis=axis, keepdims=True))


def _products(model: ir.Model) -> dict[str, tuple[str, int]]:
    """Nodes with constant weights, and which tensor's mean along which axis their bias correction needs."""
    found: dict[str, tuple[str, int]] = {}
    for node in model.graph:
        if is_op(node, *MAC_OPS) and const_of(data_input(node, 1)) is not None and is_activation(node.inputs[0]):
            axis = input_channel_axis(node)
            if axis is not None:
                found[node.name or ""] = (value_name(data_input(node)), axis)
    return found


def observed_values(model: ir.Model) -> list[ir.Value]:
    """The float tensors whose format is their own, in graph order.

    Left out are those that never exist in the integer graph (before a fused Relu, inside a lookup region) and
    those whose values come straight from another tensor (Reshape, MaxPool, Concat…), whose range follows.
    """
    interior = interior_values(list(model.graph))
    values = [value for value in model.graph.inputs if is_activation(value)]
    for node in model.graph:
        if not (inherits_format(node) or is_op(node, "Concat")):
            values += [value for value in node.outputs if value.name and is_activation(value)]
    return [value for value in values if value not in interior]


def _session(model: ir.Model, names: list[str]) -> ort.InferenceSession:
    """A session of the model with the named tensors as its outputs."""
    exposed = model.clone()
    by_name = {value_name(value): value for node in exposed.graph for value in node.outputs if value.name}
    exposed.graph.outputs.clear()
    exposed.graph.outputs.extend(by_name[name] for name in names)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    proto = ir.to_proto(exposed).SerializeToString()
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
