"""Win back accuracy after planning: better weight integers, weight scales and biases, learned layer by layer.

For each layer y = W x + b the quantized one computes Ŵ x̂ + b̂, where x̂ already carries the errors of everything before.
The best Ŵ minimises E |W x - Ŵ x̂|² over the grid once the means are taken out, which the bias makes up for exactly:

- `scales`: a channel's scale shrinks where clipping its few largest weights costs less than a coarse step;
- `gptq`, `adaround`: integers are chosen for the output's sake (`qcompiler.quant.rounding`), then polished by
  coordinate descent; what does not beat rounding to nearest is not used;
- `feedback`: Ŵ aims at weights that also correct errors in x̂ (`qcompiler.quant.feedback`);
- `bias`: b̂ = b + W E[x] - Ŵ E[x̂] (empirical bias correction, Nagel et al., DFQ, ICCV 2019, section 4.2).

Layers are repaired in order, some at a time, each group with inputs from a model in which those before are repaired.
At last both plans run on samples that were not learned from, and the repaired one is returned if it is better. Of
images there are variants, too (`qcompiler.quant.variants`), to learn from where much is learned, and to judge by.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice
from typing import Literal

import numpy as np
import onnx_ir as ir

from qcompiler.calibrate import Progress, Samples
from qcompiler.graph import const_of, data_input, input_of, is_op, nodes_of, shape_of, users, value_name
from qcompiler.passes.absorb_biases import DEVIATIONS, AbsorbBiases, ChannelMoments, reader_of
from qcompiler.passes.equalize_layers import EqualizeLayers
from qcompiler.passes.migrate_scales import MigrateScales
from qcompiler.quant.feedback import corrected
from qcompiler.quant.formats import bias_format, bit_width, least_weight_scale, spread, step, weight_limits
from qcompiler.quant.layer_rows import from_weight_rows, has_rows, weight_rows
from qcompiler.quant.moments import Moments, Sample, Tap, collect
from qcompiler.quant.operators import MAC_OPS, own_producer
from qcompiler.quant.quantize import quantize
from qcompiler.quant.rounding import DAMPING, Problem, adaround, damped, descend, gptq
from qcompiler.quant.types import Quality, QuantPlan, Ranges, Technique, TensorFormat
from qcompiler.quant.variants import Variants

Step = Literal["scales", "gptq", "adaround", "feedback", "bias"]

SAMPLES = 64
"""Samples learned from and judged on, at most."""
JUDGED = 4
"""Every so-manieth sample is kept for judging, if there are enough."""
JUDGED_BY = 16
"""Samples that decide whether equalizing helps."""
VARIANTS = 3
"""Of each image that is judged by."""
LOW_BITS = 6
"""Weights of fewer bits gain from smaller scales and learned rounding; eight bits hardly do."""
LEAST_PROBABILITY = 1 / 512
"""Probabilities a network gives out in 8 bits count as at least this, half a step."""
_MORE_DAMPING = 0.2
"""For integers with `feedback`, instead of `DAMPING`: with so little the samples would be learned by heart."""
_FACTORS = np.linspace(1.0, 0.4, 13)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Effort:
    """What to do, and how long it may take."""

    steps: tuple[Step, ...]
    seconds: float
    """Of this thread's processor time, so that what else runs on the machine does not change the result."""
    groups: int
    """Into how many groups layers are divided, at most."""
    otherwise: "Effort | None" = None
    """What to try besides: with few rows to learn from, less may be more."""
    tuning_seconds: float = 0.0
    """How long scales and biases are tuned as a whole (`qcompiler.finetune.tune_scales`); 0: not at all."""
    variants: int = 0
    """Of each image that is learned from."""

    def without(self, techniques: Collection[Technique]) -> "Effort":
        """The effort but for some of its steps."""
        return replace(
            self,
            steps=tuple(step for step in self.steps if step not in techniques),
            otherwise=None if self.otherwise is None else self.otherwise.without(techniques),
            tuning_seconds=0.0 if "tune" in techniques else self.tuning_seconds,
        )


_BALANCED = Effort(("scales", "gptq", "bias"), 40.0, 4)

EFFORTS: Mapping[Quality, Effort] = {
    "fast": Effort((), 0.0, 0),
    "balanced": _BALANCED,
    "best": Effort(
        ("scales", "gptq", "adaround", "feedback", "bias"),
        240.0,
        64,
        otherwise=_BALANCED,
        tuning_seconds=100.0,
        variants=3,
    ),
}
"""`fast` keeps the plan: its ranges minimise the squared error, and its biases are corrected analytically."""


def repair(
    model: ir.Model, plan: QuantPlan, samples: Samples, effort: Effort, progress: Progress | None = None
) -> QuantPlan:
    """A plan whose quantized model comes closer to the float one.

    Args:
        model: the float model the plan was made for.
        plan: from `plan`.
        samples: the first `SAMPLES` are used. Of synthetic ones nothing can be learned: the plan comes back as it is.
        effort: one of `EFFORTS`, or a choice of steps.
        progress: told (layers done, layers in all).

    Returns:
        The `closest` of `repaired_plans`.
    """
    return closest(model, repaired_plans(model, plan, samples, effort, progress), samples)


def repaired_plans(
    model: ir.Model, plan: QuantPlan, samples: Samples, effort: Effort, progress: Progress | None = None
) -> list[QuantPlan]:
    """The plan as given, and what each effort makes of it, the least effort last. Arguments as of `repair`."""
    layers = [node for node in model.graph if _repairable(node, plan)]
    if samples.synthetic or not effort.steps or not layers:
        if samples.synthetic and effort.steps:
            _log.warning("without calibration data there is nothing to repair the quantized model by")
        return [plan]
    learned, _ = split_samples(list(islice(samples, SAMPLES)))
    plans = [plan]
    chosen: Effort | None = effort
    while chosen is not None:
        plans.append(_repaired(model, plan, layers, learned, chosen, progress))
        chosen = chosen.otherwise
    return plans


def closest(model: ir.Model, plans: Sequence[QuantPlan], samples: Samples) -> QuantPlan:
    """The plan with the least `output_errors` on the samples that repair does not learn from, and their variants."""
    if len(plans) == 1:
        return plans[0]
    _, judged = split_samples(list(islice(samples, SAMPLES)))
    varied = Variants(judged, model, VARIANTS)
    errors = output_errors(model, [quantize(model, each) for each in plans], varied)
    _log.info("repair: output errors %s on %d samples", ", ".join(f"{error:.3g}" for error in errors), len(varied))
    return plans[int(np.argmin(errors))]


def _repaired(
    model: ir.Model,
    plan: QuantPlan,
    layers: Sequence[ir.Node],
    samples: Sequence[Sample],
    effort: Effort,
    progress: Progress | None,
) -> QuantPlan:
    """The plan after one effort, good or bad."""
    start = time.thread_time()
    learned: Sequence[Sample] = Variants(samples, model, effort.variants)
    repaired, done, size = plan, 0, max(1, -(-len(layers) // effort.groups))
    while done < len(layers):
        began = time.thread_time()
        group = layers[done : done + size]
        quantized = quantize(model, repaired)
        parts = _parts(learned, len(samples), 2 if "feedback" in effort.steps else 1)
        moments = [collect(model, quantized, group, part) for part in parts]
        for node in group:
            seen = [part[name] for part in moments if (name := node.name or "") in part]
            if len(seen) == len(parts):
                hurried = time.thread_time() - start > effort.seconds
                if not _settled(node, group):
                    # The errors in its input are about to shrink; making up for them twice would be worse than never.
                    seen = [part.of_float() for part in seen]
                repaired = _repair_layer(node, repaired, seen, effort.steps, hurried=hurried)
        done += len(group)
        if progress is not None:
            progress(done, len(layers))
        # If the rest would not be done in time, variants are left out first; then groups grow.
        left = effort.seconds - (time.thread_time() - start)
        affordable = max(1, int(left / max(time.thread_time() - began, 1e-3)))
        wanted = -(-(len(layers) - done) // affordable)
        if wanted > size and len(learned) > len(samples):
            learned = samples
        else:
            size = max(size, wanted)
    return repaired


def uncorrected(model: ir.Model, plan: QuantPlan) -> QuantPlan:
    """The plan without corrections of biases, and without biases where the model has none."""
    given = {node.name for node in model.graph if input_of(node, 2) is not None}
    return replace(plan, bias_shifts={}, biases={name: fmt for name, fmt in plan.biases.items() if name in given})


def equalizers(
    model: ir.Model, samples: Samples, *, per_channel: bool, without: Collection[Technique] = ()
) -> list[ir.passes.InPlacePass]:
    """Passes that may make a float model quantize better.

    Args:
        samples: the first `JUDGED_BY` say how large channels become.
        per_channel: whether weights have one scale per output channel; else `EqualizeLayers` is among them.
        without: "absorb", "equalize" and "migrate" leave out theirs.
    """
    moments = {} if "absorb" in without else _output_moments(model, samples)
    absorbable = any((channel.mean > DEVIATIONS * channel.deviation).any() for channel in moments.values())
    passes: list[ir.passes.InPlacePass] = [AbsorbBiases(moments)] if absorbable else []
    if not per_channel and "equalize" not in without:
        passes.append(EqualizeLayers())
    names = [value_name(data_input(node)) for node in model.graph if is_op(node, "MatMul") and has_rows(node)]
    if names and "migrate" not in without:
        tap, maxima = Tap(model, names), dict[str, np.ndarray]()
        for sample in islice(samples, JUDGED_BY):
            for name, tensor in tap.run(sample).items():
                largest = np.abs(tensor).max(axis=tuple(range(tensor.ndim - 1)))
                maxima[name] = np.maximum(maxima.get(name, 0), largest)
        passes.append(MigrateScales({name: maxima[name] for name in names}))
    return passes


def _output_moments(model: ir.Model, samples: Samples) -> dict[str, ChannelMoments]:
    """Of what layers make whose bias another may absorb."""
    layers = [node for node in nodes_of(model.graph, "Conv", "Gemm") if reader_of(node) is not None]
    names = [value_name(node.outputs[0]) for node in layers]
    if not names:
        return {}
    tap, seen = Tap(model, names), {name: list[np.ndarray]() for name in names}
    for sample in islice(samples, JUDGED_BY):
        values = tap.run(sample)
        for name in names:
            tensor = values[name]
            channels = np.moveaxis(tensor, 1, -1).reshape(-1, tensor.shape[1]).astype(np.float64)
            seen[name].append(np.stack([channels.mean(axis=0), np.square(channels).mean(axis=0)]))
    moments: dict[str, ChannelMoments] = {}
    for name, parts in seen.items():
        mean, square = np.mean(parts, axis=0)
        moments[name] = ChannelMoments(mean, np.sqrt(np.maximum(square - mean**2, 0)))
    return moments


def change_if_better(
    model: ir.Model,
    change: ir.passes.InPlacePass,
    ranges: Ranges,
    plan: QuantPlan,
    planned: Callable[[ir.Model], tuple[Ranges, QuantPlan]],
    samples: Samples,
) -> tuple[ir.Model, Ranges, QuantPlan]:
    """The model after `change` with its ranges and plan, if it then quantizes better; else what was given.

    Evening out weights makes activations uneven and the other way round, so that it does not always help.

    Args:
        change: computes the same; one of `equalizers`.
        planned: calibrates a model and plans its quantization.
        samples: the first `JUDGED_BY` decide.
    """
    even = model.clone()
    if not change(even).modified:
        return model, ranges, plan
    even_ranges, even_plan = planned(even)
    judged = list(islice(samples, JUDGED_BY))
    (before,), (after,) = (
        output_errors(each, [quantize(each, formats)], judged) for each, formats in ((model, plan), (even, even_plan))
    )
    _log.info("%s: output error %.3g -> %.3g on %d samples", type(change).__name__, before, after, len(judged))
    return (even, even_ranges, even_plan) if after < before else (model, ranges, plan)


def output_errors(model: ir.Model, candidates: Sequence[ir.Model], samples: Sequence[Sample]) -> list[float]:
    """For each candidate the squared error of its outputs relative to their power in the float model.

    Of probabilities that a Softmax makes, Kullback-Leibler's divergence: squares see little but the likeliest class.
    """
    makers = [own_producer(value) for value in model.graph.outputs]
    probable = [maker is not None and is_op(maker, "Softmax") for maker in makers]
    taps = [Tap(each, [value_name(value) for value in each.graph.outputs]) for each in (model, *candidates)]
    errors = np.zeros(len(candidates))
    for sample in samples:
        exact, *others = ([tap.run(sample)[name] for name in taps[0].names] for tap in taps)
        for index, outputs in enumerate(others):
            for output, wanted, divergence in zip(outputs, exact, probable, strict=True):
                errors[index] += _divergence(output, wanted) if divergence else _relative(output, wanted)
    return (errors / len(samples)).tolist()


def _relative(output: np.ndarray, wanted: np.ndarray) -> float:
    power = float(np.square(wanted, dtype=np.float64).mean())
    return float(np.square(output.astype(np.float64) - wanted).mean()) / max(power, 1e-30)


def _divergence(output: np.ndarray, wanted: np.ndarray) -> float:
    """Of probabilities that are at least `LEAST_PROBABILITY`, and so need not sum to 1; of a sample, in nats."""
    found, exact = (np.maximum(each.astype(np.float64), LEAST_PROBABILITY) for each in (output, wanted))
    return float((exact * np.log(exact / found) - exact + found).sum()) / output.shape[0]


def learns_from(index: int, count: int) -> bool:
    """Whether repair learns from the sample of this index of so many; what it is measured on should be others."""
    return index < SAMPLES and (index % JUDGED != 0 or count < 4 * JUDGED)


def split_samples(samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Samples to learn from and samples to judge by; the same if there are few."""
    if len(samples) < 4 * JUDGED:
        return samples, samples
    return [s for index, s in enumerate(samples) if learns_from(index, len(samples))], samples[::JUDGED]


def _repairable(node: ir.Node, plan: QuantPlan) -> bool:
    if not is_op(node, *MAC_OPS) or node.name in plan.float_nodes or const_of(data_input(node, 1)) is None:
        return False
    weights = data_input(node, 1)
    return value_name(weights) in plan.weights and len(users(weights)) == 1 and has_rows(node)


def _settled(node: ir.Node, group: Sequence[ir.Node]) -> bool:
    """Whether none of the group stands before `node`, so that what reaches it stays as it was measured."""
    others = {other for other in group if other is not node}
    seen, frontier = {node}, [node]
    while frontier:
        fresh = set(frontier.pop().predecessors()) - seen
        if fresh & others:
            return False
        seen |= fresh
        frontier += fresh
    return True


def _parts(samples: Sequence[Sample], count: int, parts: int) -> list[Iterator[Sample]]:
    """The samples in so many parts; variants of a sample, `count` places behind each other, are in one."""

    def part(which: int) -> Iterator[Sample]:
        return (samples[index] for index in range(len(samples)) if index % count % parts == which)

    return [part(which) for which in range(min(parts, count))]


def _repair_layer(
    node: ir.Node, plan: QuantPlan, seen: Sequence[Moments], steps: Sequence[Step], *, hurried: bool
) -> QuantPlan:
    name = value_name(data_input(node, 1))
    fmt, weights = plan.weights[name], const_of(data_input(node, 1))
    assert weights is not None
    exact = weight_rows(node, weights).astype(np.float64)
    moments = reduce(Moments.joined, seen)
    # A bias takes out the means; a MatMul has none.
    corrects = is_op(node, "Conv", "Gemm") and ("bias" in steps or node.name in plan.bias_shifts)
    gram = moments.covariance if corrects else moments.gram
    aim = exact
    if "feedback" in steps:
        aim = corrected(exact, seen, centred=corrects)
    hessian = damped(gram, moments.rows, _MORE_DAMPING if "feedback" in steps else DAMPING)
    low_bits = bit_width(fmt.dtype) < LOW_BITS
    if "scales" in steps and low_bits and fmt.block is None and not _is_power_of_two(fmt.scale):
        fmt = _shrink_scales(node, plan, fmt, aim, hessian)
    problem = _problem(node, fmt, aim, hessian)
    if node.name in plan.pruned:
        problem = replace(problem, kept=exact != 0)
    best = problem.nearest()
    candidates = []
    if "gptq" in steps:
        candidates.append(descend(problem, gptq(problem)))
    if "adaround" in steps and low_bits and not hurried:
        candidates.append(descend(problem, adaround(problem)))
    for candidate in candidates:
        better = problem.errors(candidate) < problem.errors(best)
        best = np.where(better[..., None], candidate, best)
    rounded = {**plan.rounded, name: from_weight_rows(node, best).astype(np.int64)}
    repaired = replace(plan, weights={**plan.weights, name: fmt}, rounded=rounded)
    if not corrects:
        return with_bias(node, repaired, None)
    found = moments.mean if "bias" in steps else moments.float_mean
    outputs = (rows @ mean[:, :, None] for rows, mean in ((exact, moments.float_mean), (problem.real(best), found)))
    wanted, reached = outputs
    return with_bias(node, repaired, (wanted - reached).reshape(-1))


def _problem(node: ir.Node, fmt: TensorFormat, aim: np.ndarray, hessian: np.ndarray) -> Problem:
    low, high = weight_limits(fmt.dtype, narrow=not fmt.zero_point.any())
    scale, zero_point = (_per_row(node, fmt, array.astype(np.float64)) for array in (fmt.scale, fmt.zero_point))
    return Problem(aim, hessian, scale, zero_point, low, high, step(fmt.dtype))


def _per_row(node: ir.Node, fmt: TensorFormat, array: np.ndarray) -> np.ndarray:
    """A scale or zero point as [groups, M, 1], [1, 1, 1] per tensor, or of each weight, where some share it."""
    if fmt.axis is None:
        return array.reshape(1, 1, 1)
    shape = shape_of(data_input(node, 1))
    if fmt.block is not None:
        return weight_rows(node, spread(array, fmt, shape))
    groups = weight_rows(node, np.empty(shape, np.int8)).shape[0]
    return array.reshape(groups, -1, 1)


def _shrink_scales(
    node: ir.Node, plan: QuantPlan, fmt: TensorFormat, aim: np.ndarray, hessian: np.ndarray
) -> TensorFormat:
    """Per channel (or for the tensor) the factor on the scale with which rounding to nearest errs least."""
    start = _problem(node, fmt, aim, hessian)
    errors = []
    for factor in _FACTORS:
        shrunk = replace(start, scale=start.scale * factor)
        found = shrunk.errors(shrunk.nearest())
        errors.append(found if fmt.axis is not None else np.full(1, found.sum()))
    factor = _FACTORS[np.argmin(np.stack(errors), axis=0)].reshape(fmt.scale.shape)
    floor = np.zeros(())
    if (bias := const_of(input_of(node, 2))) is not None and node.name not in plan.dynamic:
        floor = least_weight_scale(bias.reshape(-1), _input_scale(node, plan))
        floor = floor if fmt.axis is not None and floor.size == fmt.scale.size else floor.max()
    scale = np.maximum(fmt.scale * factor, np.minimum(floor, fmt.scale))
    return replace(fmt, scale=scale.astype(np.float32))


def _is_power_of_two(scale: np.ndarray) -> bool:
    """A target that rescales by shifts has no scale between a power of two and the next."""
    return bool((np.frexp(scale)[0] == 0.5).all())


def _input_scale(node: ir.Node, plan: QuantPlan) -> float:
    return float(plan.read(value_name(data_input(node)), node.name or "").scale)


def with_bias(node: ir.Node, plan: QuantPlan, shift: np.ndarray | None) -> QuantPlan:
    """Keep the bias in units of the weights' scale, which may have changed, and set what is added to it."""
    name = node.name or ""
    biases, shifts = dict(plan.biases), dict(plan.bias_shifts)
    if shift is not None:
        shifts[name] = shift
    if name not in plan.dynamic and (shift is not None or name in biases):
        scale = plan.read(value_name(data_input(node)), name).scale
        biases[name] = bias_format(scale, plan.weights[value_name(data_input(node, 1))])
    return replace(plan, biases=biases, bias_shifts=shifts)
