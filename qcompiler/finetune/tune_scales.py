"""Tune weight scales and biases of a quantized network as a whole: the last step of `--quality best`.

Repair (`qcompiler.quant.repair`) brings the outputs of each layer near. What error is left adds up over the layers, and
scales and biases can still balance it: they are two numbers per channel, few enough to be learned from tens of samples
without learning these by heart, while the integers stay as repair chose them. Needs PyTorch, the extra `finetune`.
"""

import logging
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice

import numpy as np
import onnx_ir as ir

from qcompiler.calibrate import Progress, Samples
from qcompiler.graph import const_of, data_input, input_of, is_op, shape_of, value_name
from qcompiler.quant.dynamic import shift_bias
from qcompiler.quant.formats import quantize_array
from qcompiler.quant.operators import has_weights, inherits_format, own_producer
from qcompiler.quant.repair import SAMPLES, closest, split_samples, with_bias
from qcompiler.quant.types import QuantPlan
from qcompiler.quant.variants import Variants

_log = logging.getLogger(__name__)


def tune_scales(
    model: ir.Model,
    plan: QuantPlan,
    samples: Samples,
    seconds: float,
    *,
    variants: int = 0,
    power_of_two: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> QuantPlan:
    """A plan with the same integers whose quantized model comes closer to the float one.

    Args:
        model: the float model the plan was made for.
        plan: from `repair`; activations are static.
        samples: the first `SAMPLES` are used. Of synthetic ones nothing can be learned.
        seconds: of this thread's processor time, about; where that is too short for all steps, there are fewer.
        variants: of each image that are learned from besides.
        power_of_two: whether the target wants scales that are powers of two. They stay, then, and biases are tuned.
        seed: of the order of samples. The same gives the same plan on the same kind of machine, if time suffices.
        progress: told (steps done, steps in all).

    Returns:
        The better of both on samples not learned from, as `repair` judges. The given plan, with a warning, where
        PyTorch is not installed or cannot compute the model.
    """
    layers = [node for node in model.graph if _tunable(node, plan)]
    if samples.synthetic or plan.dynamic or not layers:
        return plan
    if (reason := _obstacle(model, plan)) is not None:
        _log.warning("quality best leaves out its last step, tuning scales and biases as a whole: %s", reason)
        return plan

    from qcompiler.finetune.scale_training import train_scales

    learned, _ = split_samples(list(islice(samples, SAMPLES)))
    biased = _with_own_biases(_with_integers(plan, model), layers)
    shifted = model.clone()
    for node in shifted.graph:
        if (shift := biased.bias_shifts.get(node.name or "")) is not None:
            shift_bias(node, shift)
    found = train_scales(
        model,
        shifted,
        replace(biased, bias_shifts={}),
        compared_tensors(model.graph, plan),
        Variants(learned, model, variants),
        seconds,
        power_of_two=power_of_two,
        seed=seed,
        progress=progress,
    )
    tuned = _learned(biased, found.plan, found.biases, layers)
    return closest(model, [plan, tuned], samples)


def compared_tensors(graph: ir.Graph, plan: QuantPlan) -> list[str]:
    """Names of what the rounded network should reproduce: activations with a format of their own, and outputs.

    In the order they are computed. Of a Softmax its input counts.
    """
    names = [
        value_name(output)
        for node in graph
        for output in node.outputs
        if output.name in plan.activations and not inherits_format(node) and not is_op(node, "Softmax")
    ]
    for output in graph.outputs:
        maker = own_producer(output)
        if maker is not None and value_name(maker.outputs[0]) not in names and not is_op(maker, "Softmax"):
            names.append(value_name(output))
    return names


def _tunable(node: ir.Node, plan: QuantPlan) -> bool:
    return is_op(node, "Conv", "Gemm") and has_weights(node) and node.name not in plan.float_nodes


def _obstacle(model: ir.Model, plan: QuantPlan) -> str | None:
    """Why the network cannot be trained, or None if it can."""
    if plan.conversions or any(fmt.block for fmt in plan.weights.values()):
        return "it knows neither weights in groups nor tensors of two widths"
    if find_spec("torch") is None:
        return "it needs PyTorch, which is not installed (pip install 'qcompiler[finetune]')"

    from qcompiler.finetune.operators import refusal

    for node in model.graph:
        if (reason := refusal(node)) is not None:
            return f"of {node.name!r} ({node.op_type}), {reason}"
    return None


def _with_integers(plan: QuantPlan, model: ir.Model) -> QuantPlan:
    """The plan with integers for all weights: the nearest where none are chosen."""
    rounded = dict(plan.rounded)
    for node in model.graph:
        if has_weights(node) and node.name not in plan.float_nodes:
            name, array = value_name(data_input(node, 1)), const_of(data_input(node, 1))
            assert array is not None
            fmt = plan.weights[name]
            if name not in rounded:
                rounded[name] = quantize_array(array, fmt, narrow=not fmt.zero_point.any())
    return replace(plan, rounded=rounded)


def _with_own_biases(plan: QuantPlan, layers: list[ir.Node]) -> QuantPlan:
    """The plan with a bias of its own for each layer, if only of zeros."""
    for node in layers:
        shift = plan.bias_shifts.get(node.name or "")
        plan = with_bias(node, plan, np.zeros(shape_of(node.outputs[0])[1]) if shift is None else shift)
    return plan


def _learned(biased: QuantPlan, tuned: QuantPlan, biases: dict[str, np.ndarray], layers: list[ir.Node]) -> QuantPlan:
    """What was learned of a model with shifted biases, for the model without."""
    shifts = dict(biased.bias_shifts)
    for node in layers:
        given = const_of(input_of(node, 2))
        before = 0.0 if given is None else given.reshape(-1).astype(np.float64)
        shifts[node.name or ""] = biases[node.name or ""].astype(np.float64) - before
    return replace(tuned, bias_shifts=shifts)
