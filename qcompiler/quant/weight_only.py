"""Quantize the weights of matrix products and leave activations in float, as large transformers are stored.

A few neighbouring weights of an output, a group along the input axis, share a scale, and with four bits a zero point.
What they become is chosen by a scheme:

- `rtn`: the grid spans each group, and each weight goes to its nearest point;
- `hqq`: the grid, too, is chosen for the weights' sake: alternately weights go to the grid and the grid to the weights,
  large deviations counting little (Badri and Shaji, Half-Quadratic Quantization, 2023; the scale solved for beside the
  zero point, which must be a whole number). Needs no data;
- `gptq`: on that grid, integers are chosen for the outputs' sake (`qcompiler.quant.rounding`);
- `awq`: channels whose activations are large are multiplied before rounding, and divided in the activations, by
  sⱼ = E[xⱼ²]^(α/2), the α of each layer being the one with the least error of its outputs (Lin et al., AWQ, MLSys 2024,
  section 3.2, with the mean square in place of the mean magnitude).

The last two learn from calibration data. Embedding tables, where there are any, are stored in 8 bits by the row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import islice

import numpy as np
import onnx_ir as ir

from qcompiler.calibrate import Progress, Samples
from qcompiler.errors import QCompilerError
from qcompiler.graph import (
    add_initializer,
    const_of,
    data_input,
    graph_of,
    integer,
    is_op,
    make_node,
    make_value,
    nodes_of,
    producer,
    remove_dead,
    shape_of,
    value_name,
)
from qcompiler.integer.realize_weight_only import COMPUTE_KEY, WORD
from qcompiler.passes.quantize_embeddings import QuantizeEmbeddings
from qcompiler.quant import operators
from qcompiler.quant.formats import dequantize_array, limits, quantize_array
from qcompiler.quant.moments import Moments, Sample, collect
from qcompiler.quant.qdq import activation_dequantize
from qcompiler.quant.rounding import Problem, damped, descend, gptq
from qcompiler.quant.types import DTypeName, Quality, QuantPlan, Scheme, TensorFormat, WeightRequest, WeightType

SAMPLES = 64
"""Samples learned from, at most."""
LEARNED_AT_ONCE = 1 << 28
"""Bytes of second moments kept at a time."""
LEARNING: tuple[Scheme, ...] = ("gptq", "awq")
"""Schemes that need calibration data."""
_EXPONENTS = np.linspace(0, 1, 21)
"""The α that AWQ tries; 0 leaves the channels as they are."""
_CLIPPING = (1.0, 0.95, 0.9, 0.8)
"""Fractions of a group's span from which HQQ starts."""
_ROUNDS = 8
_NORM, _PRESSURE, _GROWTH = 0.7, 10.0, 1.05
"""Of HQQ: the exponent p of the norm that deviations are measured in, β and its growth per round."""


def is_weight_only(wanted: WeightRequest) -> bool:
    """Whether a request leaves activations in float, or rounds them inside products of weights in groups."""
    return wanted.activations == "float" or (wanted.activations == "dynamic" and wanted.group is not None)


def has_grouped_weights(model: ir.Model) -> bool:
    """Whether some matrix product of float activations has weights with scales in groups."""
    products = [node for node in nodes_of(model.graph, "Gemm") if activation_dequantize(data_input(node)) is None]
    sources = [producer(data_input(node, 1), "DequantizeLinear") for node in products]
    return any(node is not None and integer(node, "block_size", 0) for node in sources)


def note_compute(model: ir.Model, wanted: WeightRequest) -> None:
    """Note in the model whether its products round activations."""
    model.metadata_props[COMPUTE_KEY] = "int8" if wanted.activations == "dynamic" else "float32"


def weight_only(
    model: ir.Model,
    wanted: WeightRequest,
    samples: Samples,
    quality: Quality,
    keep_float: Sequence[str] = (),
    progress: Progress | None = None,
) -> tuple[ir.Model, QuantPlan]:
    """Plan the weights of every Gemm of a simplified model.

    Args:
        model: float; left as it is.
        wanted: types of weights by layer, the size of groups, the scheme, and whether activations are rounded inside
            products ("dynamic").
        samples: what gptq and awq learn from, up to `SAMPLES`.
        quality: if no scheme is asked for, `fast` rounds to nearest; others learn, or without data use hqq.
        keep_float: names of nodes whose weights stay in float.
        progress: told (layers done, layers in all).

    Returns:
        The model, with embeddings in 8 bits and channels scaled if the scheme is awq, and formats and integers of its
        weights.

    Raises:
        QCompilerError: no matrix product has constant weights, a name nobody has, groups that do not suit the kernels,
            or a scheme that has nothing to learn from.
    """
    scheme = _scheme(wanted, quality, synthetic=samples.synthetic)
    _check(wanted)
    result = model.clone()
    note_compute(result, wanted)
    products = [node for node in result.graph if _is_product(node)]
    if not products:
        raise QCompilerError(
            "the model has no matrix product with constant weights, and only those are quantized with float "
            "activations; leave out --activations float and --group-size."
        )
    tables = nodes_of(result.graph, "Gather")
    kept_tables = {node.name or "" for node in tables} & set(keep_float)
    asked = [name for name in keep_float if name not in kept_tables]
    kept = {node.name: "kept in float on request" for node in _named(products, asked, "--float")}
    by_layer: dict[str | None, WeightType] = {}
    for layer, dtype in wanted.by_layer.items():
        by_layer |= {node.name: dtype for node in _named(products, [layer], "--layer-weights")}
    sizes = {node: wanted.group for node in products}
    for layer, size in wanted.groups.items():
        sizes |= {node: size or None for node in _named(products, [layer], "--layer-weights")}
    layers = [node for node in products if node.name not in kept]
    types: dict[ir.Node, WeightType] = {node: by_layer.get(node.name, wanted.default) for node in layers}
    plan = QuantPlan({}, {}, {}, {name or "": reason for name, reason in kept.items()})
    done = 0
    for part, moments in _learned(result, layers, samples, learning=scheme in LEARNING):
        for node in part:
            plan = _plan_layer(plan, node, types[node], sizes[node], scheme, moments.get(node.name or ""))
        done += len(part)
        if progress is not None:
            progress(done, len(layers))
    QuantizeEmbeddings(kept_tables)(result)
    remove_dead(result)
    return result, plan


def _scheme(wanted: WeightRequest, quality: Quality, *, synthetic: bool) -> Scheme:
    if wanted.scheme in LEARNING and synthetic:
        raise QCompilerError(
            f"--scheme {wanted.scheme} learns from representative inputs: give --calibration, or choose rtn or hqq."
        )
    if wanted.scheme is not None:
        return wanted.scheme
    return "rtn" if quality == "fast" else "hqq" if synthetic else "gptq"


def _check(wanted: WeightRequest) -> None:
    if others := {wanted.default, *wanted.by_layer.values()} - {"int4", "int8"}:
        raise QCompilerError(
            f"weights with float activations, or in groups, are int4 or int8, not {', '.join(sorted(others))}."
        )
    for group in (wanted.group, *wanted.groups.values()):
        if group and group % WORD:
            raise QCompilerError(f"--group-size {group}: groups are multiples of {WORD}; 32 and 128 are usual.")


def _is_product(node: ir.Node) -> bool:
    if not is_op(node, "Gemm") or operators.refusal(node) is not None or not integer(node, "transB", 0):
        return False
    weights = data_input(node, 1)
    return len(shape_of(weights)) == 2 and not weights.is_graph_output()


def _named(products: Sequence[ir.Node], names: Sequence[str], option: str) -> list[ir.Node]:
    by_name = {node.name or "": node for node in products}
    for name in names:
        if name not in by_name:
            near = get_close_matches(name, by_name, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(by_name)}."
            raise QCompilerError(f"{option} {name}: no matrix product with constant weights has this name; {hint}")
    return [by_name[name] for name in names]


def _learned(
    model: ir.Model, layers: Sequence[ir.Node], samples: Samples, *, learning: bool
) -> Iterator[tuple[list[ir.Node], dict[str, Moments]]]:
    """Layers, some at a time, with what was seen of their inputs."""
    if not learning:
        yield list(layers), {}
        return
    learned: list[Sample] = list(islice(samples, SAMPLES))
    # AWQ changes the model as it goes, but computes the same: names of what layers read are looked up in the original.
    original = model.clone()
    twins = {node.name: node for node in original.graph}
    part: list[ir.Node] = []
    for index, node in enumerate(layers):
        part.append(node)
        following = layers[index + 1 : index + 2]
        size = sum(3 * 8 * shape_of(data_input(each, 1))[1] ** 2 for each in (*part, *following))
        if not following or size > LEARNED_AT_ONCE:
            yield part, collect(original, original, [twins[each.name] for each in part], learned)
            part = []


def _plan_layer(
    plan: QuantPlan, node: ir.Node, kind: WeightType, group: int | None, scheme: Scheme, moments: Moments | None
) -> QuantPlan:
    value = data_input(node, 1)
    name, array = value_name(value), const_of(value)
    assert array is not None
    if name in plan.weights:
        return plan  # two layers that share weights
    dtype: DTypeName = "int8" if kind == "int8" else "int4"
    hessian = damped(moments.float_gram, moments.rows) if moments is not None else None
    if scheme == "awq" and hessian is not None:
        factors = channel_factors(array, hessian[0], dtype, group)
        name, array = _scale_channels(node, array, factors)
    fitted = half_quadratic_format if scheme in ("hqq", "gptq") else group_format
    fmt = fitted(array, dtype, group)
    rounded = dict(plan.rounded)
    if scheme == "gptq" and hessian is not None:
        rounded[name] = _gptq(array, fmt, hessian)
    return replace(plan, weights={**plan.weights, name: fmt}, rounded=rounded)


# --- grids -------------------------------------------------------------------------------------------------------


def group_format(weights: np.ndarray, dtype: DTypeName, group: int | None) -> TensorFormat:
    """The format of weights [N, K] whose groups along K each span their weights and zero.

    Four bits have zero points, for groups are rarely even about zero and sixteen levels are few; eight bits have none.
    """
    blocks, _ = _blocks(weights, group)
    scale, zero = _span(blocks, dtype, 1.0)
    return _format(scale, zero, dtype, group, weights.shape[1])


def half_quadratic_format(weights: np.ndarray, dtype: DTypeName, group: int | None) -> TensorFormat:
    """The best by squared error of the grids that half-quadratic splitting passes through, for each group its own.

    Minimises ‖w - ŵ‖ₚ over scale and zero point by splitting off the deviations e: e shrinks towards w - ŵ, and the
    grid is fitted by least squares to w - e.
    """
    blocks, counted = _blocks(weights, group)
    smallest, largest = limits(dtype)
    best_scale, best_zero = _span(blocks, dtype, 1.0)
    least = _squared_error(blocks, best_scale, best_zero, dtype)
    for fraction in _CLIPPING:
        scale, zero = _span(blocks, dtype, fraction)
        pressure = _PRESSURE
        for _ in range(_ROUNDS):
            codes = np.clip(np.rint(blocks / scale) + zero, smallest, largest)
            error = _squared_error(blocks, scale, zero, dtype)
            better = error < least
            best_scale, best_zero = np.where(better, scale, best_scale), np.where(better, zero, best_zero)
            least = np.minimum(error, least)
            aim = blocks - _shrunk(blocks - (codes - zero) * scale, pressure)
            zero, scale = _fitted(aim, codes, counted, scale, zero, dtype)
            pressure *= _GROWTH
    return _format(best_scale, best_zero, dtype, group, weights.shape[1])


def _blocks(weights: np.ndarray, group: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Weights [N, K] as float32 [N, groups, group], zeros filling up the last one, and which of them are real."""
    outputs, depth = weights.shape
    size = depth if group is None else min(group, depth)
    fill = ((0, 0), (0, -depth % size))
    counted = np.pad(np.ones((1, depth), np.float32), fill).reshape(1, -1, size)
    return np.pad(weights.astype(np.float32), fill).reshape(outputs, -1, size), counted


def _span(blocks: np.ndarray, dtype: DTypeName, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point [N, groups, 1] of the grid over `fraction` of what each group spans."""
    smallest, largest = limits(dtype)
    low = np.minimum(blocks.min(axis=-1, keepdims=True), 0) * fraction
    high = np.maximum(blocks.max(axis=-1, keepdims=True), 0) * fraction
    if dtype == "int8":
        scale, zero = np.maximum(-low, high) / largest, np.zeros(low.shape, np.float32)
    else:
        scale = (high - low) / (largest - smallest)
        scale = np.where(scale > 0, scale, 1.0)
        zero = np.clip(np.rint(smallest - low / scale), smallest, largest)
    return np.where(scale > 0, scale, 1.0), zero


def _squared_error(blocks: np.ndarray, scale: np.ndarray, zero: np.ndarray, dtype: DTypeName) -> np.ndarray:
    codes = np.clip(np.rint(blocks / scale) + zero, *limits(dtype))
    return np.square(blocks - (codes - zero) * scale).sum(axis=-1, keepdims=True)


def _shrunk(deviation: np.ndarray, pressure: float) -> np.ndarray:
    """The proximal step of |e|ᵖ in units of the mean deviation, so that it suits weights of any size."""
    unit = np.abs(deviation).mean(axis=-1, keepdims=True) + 1e-30
    size = np.abs(deviation) / unit
    with np.errstate(divide="ignore"):
        threshold = np.power(size, np.float32(_NORM - 1)) / np.float32(pressure)
    return np.sign(deviation) * np.maximum(size - threshold, 0) * unit


def _fitted(
    aim: np.ndarray, codes: np.ndarray, counted: np.ndarray, scale: np.ndarray, zero: np.ndarray, dtype: DTypeName
) -> tuple[np.ndarray, np.ndarray]:
    """The zero point that fits codes to `aim`, a whole number, and then the scale that does."""
    number = counted.sum(axis=-1, keepdims=True)
    if dtype != "int8":
        mean = ((codes - aim / scale) * counted).sum(axis=-1, keepdims=True) / number
        zero = np.clip(np.rint(mean), *limits(dtype))
    centred = (codes - zero) * counted
    power = np.square(centred).sum(axis=-1, keepdims=True)
    fitted = (aim * centred).sum(axis=-1, keepdims=True) / np.where(power > 0, power, 1)
    return zero, np.where((power > 0) & (fitted > 0), fitted, scale)


def _format(scale: np.ndarray, zero: np.ndarray, dtype: DTypeName, group: int | None, depth: int) -> TensorFormat:
    scales, zeros = scale[..., 0].astype(np.float32), zero[..., 0].astype(np.int8)
    if scales.shape[1] == 1:
        return TensorFormat(dtype, scales[:, 0], zeros[:, 0], axis=0)
    assert group is not None and group < depth
    return TensorFormat(dtype, scales, zeros, axis=1, block=group)


# --- learning ----------------------------------------------------------------------------------------------------


def channel_factors(weights: np.ndarray, hessian: np.ndarray, dtype: DTypeName, group: int | None) -> np.ndarray:
    """AWQ's factors [K] of the input channels: those α with which rounding to nearest errs least in the outputs.

    Args:
        weights: [N, K].
        hessian: [K, K] E[x xᵀ].
    """
    power = np.sqrt(np.diag(hessian))
    power = np.maximum(power / np.exp(np.log(np.maximum(power, 1e-12)).mean()), 1e-4)
    best, least = np.ones_like(power), np.inf
    for exponent in _EXPONENTS:
        factors = power**exponent
        factors = factors / np.sqrt(factors.max() * factors.min())
        scaled = (weights * factors).astype(np.float32)
        fmt = group_format(scaled, dtype, group)
        off = weights - dequantize_array(quantize_array(scaled, fmt), fmt) / factors
        error = float(((off @ hessian) * off).sum())
        if error < least:
            best, least = factors, error
    return best.astype(np.float32)


def _scale_channels(node: ir.Node, array: np.ndarray, factors: np.ndarray) -> tuple[str, np.ndarray]:
    """Multiply the columns of a Gemm's weights and divide its activations; the new weights' name, and they."""
    graph, x, old = graph_of(node), data_input(node), data_input(node, 1)
    if (factors == 1).all():
        return value_name(old), array
    scaled = (array * factors).astype(np.float32)
    weights = add_initializer(graph, f"{old.name}_scaled", scaled)
    divisor = add_initializer(graph, f"{node.name}_channels", (1 / factors).astype(np.float32))
    product = make_value(graph, f"{node.name}_scaled", shape_of(x), ir.DataType.FLOAT)
    graph.insert_before(node, make_node("Mul", [x, divisor], [product]))
    node.replace_input_with(0, product)
    node.replace_input_with(1, weights)
    return value_name(weights), scaled


def _gptq(array: np.ndarray, fmt: TensorFormat, hessian: np.ndarray) -> np.ndarray:
    """Integers [N, K]: for each output the better of GPTQ's and of rounding to nearest."""
    low, high = limits(fmt.dtype)
    if fmt.block is None:
        scale, zero = fmt.scale[:, None], fmt.zero_point[:, None]
    else:
        scale, zero = (np.repeat(p, fmt.block, axis=1)[:, : array.shape[1]] for p in (fmt.scale, fmt.zero_point))
    exact = array[None].astype(np.float64)
    problem = Problem(exact, hessian, scale[None].astype(np.float64), zero[None].astype(np.float64), low, high)
    nearest, chosen = problem.nearest(), descend(problem, gptq(problem))
    better = problem.errors(chosen) < problem.errors(nearest)
    return np.where(better[..., None], chosen, nearest)[0].astype(np.int64)
