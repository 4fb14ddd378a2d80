"""What each layer costs in accuracy in each format: the error of the model's outputs with only it rounded so.

Errors of different layers are nearly independent, so the power of their sum is nearly the sum of their powers: the
noise of a mixed model is predicted by adding up. A layer makes noise by its weights, measured with nothing else
quantized, and by what it reads in 8 bits, measured with everything else in 16, where the target has both. Formats of
few bits are measured with repaired weights if the model will be repaired, each layer as if all before it were exact.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import onnx_ir as ir

from qcompiler.compile import Prepared, Progress
from qcompiler.quant.formats import bit_width
from qcompiler.quant.half import to_half
from qcompiler.quant.plan import plan
from qcompiler.quant.quantize import quantize
from qcompiler.quant.repair import EFFORTS, LOW_BITS, repair
from qcompiler.quant.types import Quality, QuantPlan, WeightRequest
from qcompiler.search.forms import FLOAT, UNIFORM, Form, LayerFormat, form_of
from qcompiler.search.layers import Layer, everywhere, request, stored_forms
from qcompiler.search.measure import SampleSource, measure

MOST_SAMPLES, FEWEST_SAMPLES = 64, 8
WORK = 4e11
"""Multiplications all measurements together may take, in the float model; fewer samples are used rather than more."""


@dataclass(frozen=True)
class Sensitivities:
    base: float
    """Noise of the outputs with weights exact and activations quantized as usual."""
    fixed: float
    """What of it no layer's choice changes."""
    by_layer: Mapping[tuple[str, LayerFormat], float]
    """Noise of the outputs with only this layer in this format, by layer name and format."""
    samples: int


def format_plans(
    prepared: Prepared,
    layers: Sequence[Layer],
    base: WeightRequest,
    keep_float: Sequence[str],
    quality: Quality,
    progress: Progress,
) -> dict[LayerFormat, QuantPlan]:
    """By format of weights, the plan with that format in every layer that admits it, and 8 bits in the others.

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
    found: dict[LayerFormat, QuantPlan] = {}
    for stored in stored_forms(layers):
        wanted = request(layers, everywhere(layers, stored), base).formats
        made = plan(prepared.graph, prepared.ranges, prepared.target, keep_float, wanted)
        bits = min((bit_width(made.weights[layer.weights].dtype) for layer in layers if layer.weights), default=8)
        if quality != "fast" and bits < LOW_BITS and not prepared.samples.synthetic:
            progress.stage(f"repair {stored}")
            made = repair(prepared.graph, made, prepared.samples, effort, progress.advance)
        found[stored] = made
    return found


def sensitivities(
    prepared: Prepared,
    layers: Sequence[Layer],
    plans: Mapping[LayerFormat, QuantPlan],
    base: WeightRequest,
    keep_float: Sequence[str],
    unlearned: SampleSource,
    macs: int,
    progress: Progress,
) -> Sensitivities:
    """Measure every layer in every format it admits.

    Args:
        prepared: the float model.
        layers: of `prepared.graph`.
        plans, base, keep_float: of and as for `format_plans`.
        unlearned: samples that weights were not repaired by; the first few are used.
        macs: multiplications of one inference; says how many samples are affordable.
    """
    bench = _Bench(prepared, layers, plans, base, keep_float)
    weights = [(layer, stored) for layer in layers if layer.weights for stored in stored_forms([layer])]
    halves = [(layer, name) for layer in layers for name in layer.formats if form_of(name).real not in (None, "float")]
    readers = [layer for layer in layers if any(form_of(name).wide for name in layer.formats)]
    candidates: list[Callable[[], ir.Model]] = [
        bench.activations(plans[UNIFORM]),
        *([bench.all_wide()] if readers else []),
        *(bench.weights(layer, stored) for layer, stored in weights),
        *(bench.half(layer, name) for layer, name in halves),
        *(bench.reading_narrow(layer) for layer in readers),
    ]
    affordable = int(WORK / max(1, macs * len(candidates)))
    samples = list(islice(unlearned, max(FEWEST_SAMPLES, min(MOST_SAMPLES, affordable))))
    progress.stage("measure layers")
    noises = iter([seen.noise for seen in measure(prepared.graph, candidates, samples, progress=progress.advance)])
    usual = next(noises)
    fixed = min(usual, next(noises)) if readers else usual
    by_weights = {(layer.name, stored): next(noises) for layer, stored in weights}
    by_half = {(layer.name, name): next(noises) for layer, name in halves}
    by_reading = {layer.name: max(0.0, next(noises) - fixed) for layer in readers}
    # Together they are what 8 bits everywhere cost.
    share = (usual - fixed) / max(sum(by_reading.values()), 1e-300)
    found: dict[tuple[str, LayerFormat], float] = {}
    for layer in layers:
        reading = share * by_reading.get(layer.name, 0.0)
        for name in layer.formats:
            form = form_of(name)
            if form.real is not None:
                # A layer in float reads what is quantized all the same.
                found[layer.name, name] = reading + by_half.get((layer.name, name), 0.0)
            else:
                of_weights = by_weights[layer.name, form.stored] if layer.weights else 0.0
                found[layer.name, name] = of_weights + (0.0 if form.wide else reading)
    assert all((layer.name, FLOAT) in found for layer in layers if FLOAT in layer.formats)
    return Sensitivities(usual, fixed, found, len(samples))


@dataclass(frozen=True)
class _Bench:
    """Makes models in which hardly anything is quantized, or hardly anything is not."""

    prepared: Prepared
    layers: Sequence[Layer]
    plans: Mapping[LayerFormat, QuantPlan]
    base: WeightRequest
    keep_float: Sequence[str]

    def activations(self, whole: QuantPlan) -> Callable[[], ir.Model]:
        return partial(quantize, self.prepared.graph, replace(whole, weights={}, biases={}))

    def weights(self, layer: Layer, stored: LayerFormat) -> Callable[[], ir.Model]:
        """Nothing quantized but this layer's weights, and its bias with them."""
        whole = self.plans[stored]
        assert layer.weights is not None
        only = replace(
            whole,
            activations={},
            conversions={},
            weights={layer.weights: whole.weights[layer.weights]},
            biases={name: fmt for name, fmt in whole.biases.items() if name in layer.members},
        )
        return partial(quantize, self.prepared.graph, only)

    def half(self, layer: Layer, name: LayerFormat) -> Callable[[], ir.Model]:
        halves = request([layer], (name,), self.base).halves
        return lambda: to_half(self.prepared.graph, halves)[0]

    def all_wide(self) -> Callable[[], ir.Model]:
        return self._wide_but(None)

    def reading_narrow(self, layer: Layer) -> Callable[[], ir.Model]:
        return self._wide_but(layer)

    def _wide_but(self, narrow: Layer | None) -> Callable[[], ir.Model]:
        """Weights exact, activations of 16 bits but for what one layer reads."""
        names = tuple(
            UNIFORM if layer is narrow else Form(wide=True).named(weighted=layer.weights is not None)
            for layer in self.layers
        )
        chosen = tuple(
            name if name in layer.formats else UNIFORM for name, layer in zip(names, self.layers, strict=True)
        )
        wanted = request(self.layers, chosen, self.base).formats

        def make() -> ir.Model:
            assert self.prepared.ranges is not None
            made = plan(self.prepared.graph, self.prepared.ranges, self.prepared.target, self.keep_float, wanted)
            return self.activations(made)()

        return make
