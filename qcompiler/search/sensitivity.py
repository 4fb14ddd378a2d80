"""What each layer's weights cost in accuracy in each format: the error of the model's outputs with only them rounded.

Errors of different layers are nearly independent, so the power of their sum is nearly the sum of their powers: the
noise of a mixed model is predicted by adding up. Formats of few bits are measured with repaired weights if the model
will be repaired, each layer as if all before it were exact.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

from qcompiler.compile import Prepared, Progress
from qcompiler.quant.formats import bit_width
from qcompiler.quant.plan import plan
from qcompiler.quant.quantize import quantize
from qcompiler.quant.repair import EFFORTS, LOW_BITS, repair
from qcompiler.quant.types import Quality, QuantPlan, WeightRequest, WeightType
from qcompiler.search.layers import FLOAT, UNIFORM, Layer, LayerFormat, everywhere, request, weight_types
from qcompiler.search.measure import SampleSource, measure

MOST_SAMPLES, FEWEST_SAMPLES = 64, 8
WORK = 4e11
"""Multiplications all measurements together may take, in the float model; fewer samples are used rather than more."""


@dataclass(frozen=True)
class Sensitivities:
    base: float
    """Noise of the outputs with activations quantized and weights exact."""
    by_layer: Mapping[tuple[str, LayerFormat], float]
    """Noise of the outputs with only this layer's weights in this format, by layer name and format."""
    samples: int


def format_plans(
    prepared: Prepared,
    layers: Sequence[Layer],
    base: WeightRequest,
    keep_float: Sequence[str],
    quality: Quality,
    progress: Progress,
) -> dict[WeightType, QuantPlan]:
    """By format, the plan with that format in every layer that admits it, and 8 bits in the others.

    Args:
        prepared: the float model, its ranges and samples.
        layers: of `prepared.graph`.
        base: what formats beside those of the layers are asked for.
        keep_float: names of layers the user wants in float.
        quality: unless it is fast, weights of few bits are repaired.
        progress: told how far that is.
    """
    assert prepared.ranges is not None
    # Learned rounding and repairing layers one after the other would take minutes; they only make the result better.
    effort = replace(EFFORTS["balanced"], groups=1)
    found: dict[WeightType, QuantPlan] = {}
    for dtype in weight_types(layers):
        wanted, _ = request(layers, everywhere(layers, dtype), base)
        made = plan(prepared.graph, prepared.ranges, prepared.target, keep_float, wanted)
        bits = min(bit_width(made.weights[layer.weights].dtype) for layer in layers)
        if quality != "fast" and bits < LOW_BITS and not prepared.samples.synthetic:
            progress.stage(f"repair {dtype}")
            made = repair(prepared.graph, made, prepared.samples, effort, progress.advance)
        found[dtype] = made
    return found


def sensitivities(
    prepared: Prepared,
    layers: Sequence[Layer],
    plans: Mapping[WeightType, QuantPlan],
    unlearned: SampleSource,
    macs: int,
    progress: Progress,
) -> Sensitivities:
    """Measure every layer in every format it admits.

    Args:
        prepared: the float model.
        layers: of `prepared.graph`.
        plans: from `format_plans`.
        unlearned: samples that weights were not repaired by; the first few are used.
        macs: multiplications of one inference; says how many samples are affordable.
    """
    pairs: list[tuple[Layer, WeightType]] = [(layer, dtype) for layer in layers for dtype in weight_types([layer])]
    affordable = int(WORK / max(1, macs * (len(pairs) + 1)))
    samples = list(islice(unlearned, max(FEWEST_SAMPLES, min(MOST_SAMPLES, affordable))))
    progress.stage("measure layers")
    activations = replace(plans[UNIFORM], weights={}, biases={})
    candidates = [activations, *(_only(plans[dtype], layer) for layer, dtype in pairs)]
    found = measure(
        prepared.graph,
        [partial(quantize, prepared.graph, each) for each in candidates],
        samples,
        progress=progress.advance,
    )
    noises: dict[tuple[str, LayerFormat], float] = {
        (layer.name, dtype): seen.noise for (layer, dtype), seen in zip(pairs, found[1:], strict=True)
    }
    noises |= {(layer.name, FLOAT): 0.0 for layer in layers}
    return Sensitivities(found[0].noise, noises, len(samples))


def _only(whole: QuantPlan, layer: Layer) -> QuantPlan:
    """Nothing quantized but this layer's weights, and its bias with them."""
    return replace(
        whole,
        activations={},
        weights={layer.weights: whole.weights[layer.weights]},
        biases={name: fmt for name, fmt in whole.biases.items() if name in layer.members},
    )
