"""Make weights zero, and let those that stay make up for it.

Which weights of a layer go is decided by what they cost: with input rows x and H = E[x xᵀ], removing weight k while the
others are free to move adds w_k² / [H⁻¹]_kk to the squared error of the output. Weights are decided on in blocks of
columns, and each removed one is made up for by the columns behind it (SparseGPT: Frantar and Alistarh, ICML 2023,
algorithm 1); what is kept is then solved for, the others staying zero. Layers are pruned in order,
each on what the pruned layers before it make, aiming at what it made in the float model; biases take up the means. Of
several solutions, and of dropping the smallest weights, a layer gets the one that errs least on held-out samples.

Without calibration data the smallest weights of each layer go and the others stay as they are.
"""

import logging
from collections.abc import Callable
from itertools import islice

import numpy as np
import onnx_ir as ir

from qcompiler.calibrate import Progress, Samples
from qcompiler.errors import QCompilerError
from qcompiler.graph import add_initializer, const_of, data_input, graph_of, input_of, integer, is_op, shape_of, users
from qcompiler.integer.sparsity import BLOCK, KEPT
from qcompiler.quant.layer_rows import from_weight_rows, has_rows, weight_rows
from qcompiler.quant.moments import Moments, collect
from qcompiler.quant.operators import has_weights
from qcompiler.quant.plan import edge_layers
from qcompiler.quant.repair import split_samples
from qcompiler.quant.rounding import damped
from qcompiler.quant.types import PruneRequest

SAMPLES = 64
"""Samples learned from, at most."""
GROUPS = 4
"""Into how many groups layers are divided; each group is measured on the pruned layers before it."""
_COLUMNS = 128
"""Columns of a block in which a fraction of the weights goes (SparseGPT's Bs)."""
_DAMPING = (0.01, 1.0)
"""Fractions of the mean diagonal of H to add to it: where few rows were seen, more of it errs less on others."""
_REFIT_STEPS, _PRECISION = 60, 1e-10
"""Of the conjugate gradients: most steps, and the squared gradient to stop at, relative to the first."""

Chooser = Callable[[np.ndarray], np.ndarray]
"""From costs of removal [groups, M, columns] to which stay, bool of that shape."""

_log = logging.getLogger(__name__)


def parse(text: str) -> PruneRequest:
    """Read "0.5" or "2:4".

    Raises:
        QCompilerError: anything else.
    """
    if text == "2:4":
        return PruneRequest(two_of_four=True)
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1.0
    if not 0 < fraction < 1:
        raise QCompilerError(
            f"--prune {text}: write a fraction of the weights, such as 0.5, or 2:4 for two in every four."
        )
    return PruneRequest(fraction)


def prune(
    model: ir.Model, request: PruneRequest, samples: Samples, progress: Progress | None = None
) -> tuple[ir.Model, frozenset[str]]:
    """A model with zeros among its weights; the given one is left alone.

    Convolutions and products with constant weights are pruned, but for the first and the last, depthwise ones, and
    those whose input channels are no multiple of four if two of four are to go.

    Args:
        model: float, simplified.
        request: how many weights go.
        samples: the first `SAMPLES` are learned from.
        progress: told (layers done, layers in all).

    Returns:
        The model, its names unchanged, and the names of the nodes whose weights were pruned.
    """
    layers = [node for node in _layers(model) if _prunable(node, request)]
    pruned = model.clone()
    twins = {node.name: node for node in pruned.graph}
    if samples.synthetic:
        _log.warning("without calibration data, pruning keeps the largest weights and nothing makes up for the others")
    learned, judged = split_samples(list(islice(samples, SAMPLES)))
    size = max(1, -(-len(layers) // GROUPS))
    for start in range(0, len(layers), size):
        group = layers[start : start + size]
        seen, held = (
            ({}, {}) if samples.synthetic else (collect(model, pruned, group, part) for part in (learned, judged))
        )
        for node in group:
            name = node.name or ""
            _prune_layer(twins[name], request, (seen[name], held[name]) if name in seen and name in held else None)
        if progress is not None:
            progress(min(start + size, len(layers)), len(layers))
    return pruned, frozenset(node.name or "" for node in layers)


def _layers(model: ir.Model) -> list[ir.Node]:
    nodes = list(model.graph)
    weighted = [node for node in nodes if has_weights(node) and has_rows(node)]
    edges = edge_layers(nodes, weighted)
    return [node for node in weighted if node not in edges and len(users(data_input(node, 1))) == 1]


def _prunable(node: ir.Node, request: PruneRequest) -> bool:
    group = integer(node, "group", 1) if is_op(node, "Conv") else 1
    depth = _depth(node)
    return group == 1 and depth % BLOCK == 0 if request.two_of_four else depth > 1


def _depth(node: ir.Node) -> int:
    """Input channels of one group."""
    shape = shape_of(data_input(node, 1))
    transposed = is_op(node, "Gemm") and integer(node, "transB", 0)
    return shape[1] if is_op(node, "Conv") or transposed else shape[0]


def _prune_layer(node: ir.Node, request: PruneRequest, moments: tuple[Moments, Moments] | None) -> None:
    """Prune the weights by moments to learn from and moments to judge by, or by their magnitude."""
    value = data_input(node, 1)
    array = const_of(value)
    assert array is not None
    weights = weight_rows(node, array).astype(np.float64)
    order = _channels_last(node, weights.shape[2])
    weights = weights[..., order]
    choose, columns = (_two_of_four, BLOCK) if request.two_of_four else (_largest(1 - request.fraction), _COLUMNS)
    best = np.where(choose(np.abs(weights)), weights, 0)
    if moments is not None:
        corrects = is_op(node, "Conv", "Gemm")
        (gram, cross), (held_gram, held_cross) = (_second_moments(part, order, about_mean=corrects) for part in moments)
        candidates = [best]
        for fraction in _DAMPING:
            hessian = damped(gram, moments[0].rows, fraction)
            aim = weights + weights @ np.linalg.solve(hessian, cross - gram).transpose(0, 2, 1)
            kept, started = sparse_gpt(aim, hessian, choose, columns)
            candidates += [started, refit(aim, hessian, kept, started)]
        # The squared error of the outputs on what was not learned from, less what all have in common.
        errors = [
            float(((found @ held_gram - 2 * weights @ held_cross.transpose(0, 2, 1)) * found).sum())
            for found in candidates
        ]
        best = candidates[int(np.argmin(errors))]
        if corrects:
            mean, float_mean = moments[0].mean[:, order, None], moments[0].float_mean[:, order, None]
            _shift_bias(node, (weights @ float_mean - best @ mean).reshape(-1))
    restored = from_weight_rows(node, best[..., np.argsort(order)]).astype(array.dtype)
    value.const_value = ir.tensor(restored, name=value.name)


def _second_moments(moments: Moments, order: np.ndarray, *, about_mean: bool) -> tuple[np.ndarray, np.ndarray]:
    """E[x̂ x̂ᵀ] and E[x̂ xᵀ], columns in `order`; of deviations from the means where a bias takes those up."""
    pair = (moments.covariance, moments.cross_covariance) if about_mean else (moments.gram, moments.cross)
    gram, cross = (matrix[:, order][:, :, order] for matrix in pair)
    return gram, cross


def _channels_last(node: ir.Node, size: int) -> np.ndarray:
    """The order of a row's columns in which neighbours are input channels of one kernel element."""
    depth = _depth(node)
    return np.arange(size).reshape(depth, -1).T.reshape(-1)


def _largest(fraction: float) -> Chooser:
    """That fraction of all weights of a block stays."""

    def choose(costs: np.ndarray) -> np.ndarray:
        flat = costs.reshape(costs.shape[0], -1)
        count = round(fraction * flat.shape[1])
        kept = np.zeros(flat.shape, bool)
        np.put_along_axis(kept, np.argsort(-flat, axis=1, kind="stable")[:, :count], True, axis=1)
        return kept.reshape(costs.shape)

    return choose


def _two_of_four(costs: np.ndarray) -> np.ndarray:
    blocks = costs.reshape(*costs.shape[:-1], -1, BLOCK)
    kept = np.zeros(blocks.shape, bool)
    np.put_along_axis(kept, np.argsort(-blocks, axis=-1, kind="stable")[..., :KEPT], True, axis=-1)
    return kept.reshape(costs.shape)


def sparse_gpt(
    weights: np.ndarray, hessian: np.ndarray, choose: Chooser, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which weights stay, bool [groups, M, K], and all weights, zeros and those that make up for them.

    Args:
        weights: [groups, M, K] to come close to.
        hessian: [groups, K, K] positive definite.
        choose: decides on a block from the costs of removing its weights.
        columns: of a block.
    """
    left = weights.astype(np.float64).copy()
    # Row k of the upper Cholesky factor of the inverse says how the later weights make up for an error in weight k, and
    # its diagonal squared is [H⁻¹]_kk with the weights before k settled.
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).transpose(0, 2, 1)
    diagonal = np.einsum("gkk->gk", factor)
    kept, errors, size = np.zeros(left.shape, bool), np.empty_like(left), left.shape[2]
    for start in range(0, size, _COLUMNS):
        end = min(start + _COLUMNS, size)
        for first in range(start, end, columns):
            last = min(first + columns, end)
            block = slice(first, last)
            kept[..., block] = choose((left[..., block] / diagonal[:, None, block]) ** 2)
            for k in range(first, last):
                errors[..., k] = np.where(kept[..., k], 0, left[..., k]) / factor[:, k, k, None]
                left[..., k + 1 : end] -= errors[..., k, None] * factor[:, None, k, k + 1 : end]
        # What lies behind makes up for all these errors at once: the same sums, but as a matrix product.
        left[..., end:] -= errors[..., start:end] @ factor[:, start:end, end:]
    return kept, np.where(kept, left, 0)


def refit(aim: np.ndarray, hessian: np.ndarray, kept: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The weights of least error that are zero where not `kept`: conjugate gradients from `start`, all rows at once.

    The error never grows from one step to the next, so that it is safe to stop before the minimum.
    """
    solved = start.copy()
    residual = np.where(kept, (aim - solved) @ hessian, 0)
    direction, power = residual, np.square(residual).sum(axis=2, keepdims=True)
    wanted = _PRECISION * power
    for _ in range(_REFIT_STEPS):
        if (power <= wanted).all():
            break
        image = np.where(kept, direction @ hessian, 0)
        curvature = (direction * image).sum(axis=2, keepdims=True)
        step = np.where(curvature > 0, power / np.where(curvature > 0, curvature, 1), 0)
        solved += step * direction
        residual = residual - step * image
        last, power = power, np.square(residual).sum(axis=2, keepdims=True)
        direction = residual + np.where(last > 0, power / np.where(last > 0, last, 1), 0) * direction
    return solved


def _shift_bias(node: ir.Node, shift: np.ndarray) -> None:
    old = const_of(input_of(node, 2))
    bias = shift if old is None else old.reshape(-1) + shift
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, add_initializer(graph_of(node), f"{node.name}_bias", bias.astype(np.float32)))
