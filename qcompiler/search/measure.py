"""How far quantized models are from the float one, over any number of samples at a time.

Of a classifier three things are measured. What its labels say, if there are any. How often both models rank the same
class first. And the loss of top-1 that the float model itself expects: the probability it gives to its own first class
less the one it gives to the quantized model's, which is 0 where both agree and needs no labels. It varies far less from
sample to sample than right and wrong do, and it is true as far as the float model's probabilities are.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import onnx_ir as ir

from qcompiler.graph import value_name
from qcompiler.quant.moments import Sample, Tap

TOGETHER = 8
"""Models that are open at a time; the float one runs once for so many."""


@dataclass(frozen=True)
class Measured:
    """One quantized model beside the float one."""

    samples: int
    noise: float
    """Power of the outputs' errors over the power of the outputs, summed over outputs."""
    agreement: float | None
    """Share of samples on which both rank the same class first; None if no output is a vector of classes."""
    expected_drop: float | None
    """The loss of top-1 the float model expects, as a share; None as above."""
    expected_drop_error: float | None
    """Its standard error."""
    top1: float | None
    """By the labels; None without."""
    drop: float | None
    """Top-1 of the float model less this one's; None without labels."""
    drop_error: float | None
    """Its standard error."""

    @property
    def sqnr(self) -> float | None:
        """dB; None if identical."""
        return -10 * math.log10(self.noise) if self.noise > 0 else None

    @property
    def loss(self) -> float:
        """What a budget for the loss of accuracy is held against. Without classes, `noise`.

        One standard error above the expected loss, so that chance does not pass a model too easily; or, if that is
        more, one standard error below the loss by the labels, of which a few hundred say little about a point or two.
        """
        if self.expected_drop is None or self.expected_drop_error is None:
            return self.noise
        expected = self.expected_drop + self.expected_drop_error
        if self.drop is None or self.drop_error is None:
            return expected
        return max(expected, self.drop - self.drop_error)


class SampleSource(Protocol):
    """Samples that can be read any number of times."""

    def __iter__(self) -> Iterator[Sample]: ...


def measure(
    model: ir.Model,
    candidates: Sequence[Callable[[], ir.Model]],
    samples: SampleSource,
    labels: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Measured]:
    """Run quantized models beside the float one. Memory does not grow with the number of samples.

    Args:
        model: the float model.
        candidates: each makes a model with the same inputs and outputs, when its turn comes.
        samples: batch-1 arrays by input name.
        labels: the class of each sample, int64 [samples].
        progress: told (models done, models in all).
    """
    names = [value_name(value) for value in model.graph.outputs]
    exact = Tap(model, names)
    found: list[Measured] = []
    for start in range(0, len(candidates), TOGETHER):
        batch = candidates[start : start + TOGETHER]
        taps = [Tap(make(), names) for make in batch]
        tallies = [_Tally() for _ in batch]
        for index, sample in enumerate(samples):
            wanted = exact.run(sample)
            classes = classes_of(wanted, names, sample)
            label = None if labels is None else int(labels[index])
            for tap, tally in zip(taps, tallies, strict=True):
                tally.add(wanted, tap.run(sample), names, classes, label)
        found += [tally.result() for tally in tallies]
        if progress is not None:
            progress(len(found), len(candidates))
    return found


def classes_of(outputs: Sample, names: Iterable[str], sample: Sample) -> str | None:
    """The first output that looks like scores of classes, or None.

    That is one vector of at least two, smaller than what it was made from: an autoencoder's output, or an embedding of
    a few words, is no score.
    """
    most = max(array.size for array in sample.values())
    return next(
        (
            name
            for name in names
            if outputs[name].dtype.kind == "f" and 1 < outputs[name].size == max(outputs[name].shape) < most
        ),
        None,
    )


def probabilities(scores: np.ndarray) -> np.ndarray:
    """Of a vector of scores; logits go through softmax, what sums to 1 already is left as it is."""
    flat = scores.reshape(-1).astype(np.float64)
    if flat.min() >= 0 and abs(flat.sum() - 1) < 1e-3:
        return flat
    powers = np.exp(flat - flat.max())
    return powers / powers.sum()


@dataclass
class _Tally:
    """Running sums over samples of one model."""

    signal: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    agreed: int = 0
    losses: list[float] = field(default_factory=list)
    """One number for each sample of a classifier."""
    hits: int = 0
    changes: list[int] = field(default_factory=list)
    """Of each labelled sample: whether the float model is right, less whether this one is."""
    samples: int = 0

    def add(self, wanted: Sample, got: Sample, names: Sequence[str], classes: str | None, label: int | None) -> None:
        self.samples += 1
        for name in names:
            expected = wanted[name].astype(np.float64)
            self.signal[name] = self.signal.get(name, 0.0) + float(np.sum(expected**2))
            self.noise[name] = self.noise.get(name, 0.0) + float(np.sum((got[name] - expected) ** 2))
        if classes is None:
            return
        first, ours = int(wanted[classes].argmax()), int(got[classes].argmax())
        chances = probabilities(wanted[classes])
        self.agreed += first == ours
        self.losses.append(float(chances[first] - chances[ours]))
        if label is not None:
            self.hits += ours == label
            self.changes.append(int(first == label) - int(ours == label))

    def result(self) -> Measured:
        noise = sum(self.noise[name] / max(self.signal[name], 1e-30) for name in self.noise)
        count, labelled = len(self.losses), len(self.changes)
        return Measured(
            samples=self.samples,
            noise=noise,
            agreement=self.agreed / count if count else None,
            expected_drop=float(np.mean(self.losses)) if count else None,
            expected_drop_error=float(np.std(self.losses)) / math.sqrt(count) if count else None,
            top1=self.hits / labelled if labelled else None,
            drop=float(np.mean(self.changes)) if labelled else None,
            drop_error=float(np.std(self.changes)) / math.sqrt(labelled) if labelled else None,
        )
