"""Run the compiled model beside the one it was made from."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from qcompiler.exact_session import exact_session
from qcompiler.onnx_file import for_onnxruntime
from qcompiler.report import OutputCheck, SelfCheck

SAMPLES = 16
"""Enough to see a broken layer; accuracy needs a labelled data set."""

DOUBTFUL = 10.0
"""dB of SQNR below which an output deserves a warning: its error has a third of its amplitude, or more."""

Arrays = Mapping[str, np.ndarray]


@dataclass
class _Sums:
    """Running sums over samples of one output."""

    signal: float = 0.0
    noise: float = 0.0
    agreements: list[bool] = field(default_factory=list)

    def add(self, reference: np.ndarray, compiled: np.ndarray) -> None:
        wanted, got = reference.astype(np.float64), compiled.astype(np.float64)
        self.signal += float(np.sum(wanted**2))
        self.noise += float(np.sum((wanted - got) ** 2))
        if _ranks_classes(reference):
            self.agreements.append(int(wanted.argmax()) == int(got.argmax()))

    def check(self, output: str) -> OutputCheck:
        agreement = float(np.mean(self.agreements)) if self.agreements else None
        return OutputCheck(output, sqnr(self.signal, self.noise), agreement)


def self_check(model: Path, compiled: Callable[[Arrays], Arrays], samples: Iterable[Arrays]) -> SelfCheck:
    """Compare outputs on the first `SAMPLES` samples.

    Args:
        model: the user's file; of a TFLite one, the ONNX model it is read as runs. ONNX Runtime runs it without graph
            optimizations, so that nothing of ours stands on both sides of the comparison.
        compiled: runs the compiled model on one sample, by input and output name.
        samples: batch-1 arrays by input name.
    """
    session = exact_session(for_onnxruntime(model), optimize=False)
    outputs = [output.name for output in session.get_outputs()]
    # A half-precision model is compiled in float32.
    halves = {value.name for value in session.get_inputs() if value.type == "tensor(float16)"}
    sums = {name: _Sums() for name in outputs}
    count = 0
    for sample in islice(samples, SAMPLES):
        count += 1
        feed = {name: array.astype(np.float16) if name in halves else array for name, array in sample.items()}
        got = compiled(sample)
        for name, reference in zip(outputs, session.run(outputs, feed), strict=True):
            sums[name].add(np.asarray(reference), got[name])
    return SelfCheck(count, tuple(sums[name].check(name) for name in outputs))


def doubts(check: SelfCheck, model: str) -> tuple[str, ...]:
    """A warning for each output that is far from what it should be; none where it should be zero."""
    return tuple(
        f"the output {output.output!r} is far from that of the original model: {output.sqnr:.1f} dB; "
        f"`qcompile debug {model}` names the layers that hurt and what helps"
        for output in check.outputs
        if output.sqnr is not None and -np.inf < output.sqnr < DOUBTFUL
    )


def sqnr(signal: float, noise: float) -> float | None:
    """Signal to quantization noise in dB, from sums of squares; None without noise."""
    if noise == 0:
        return None
    return 10 * float(np.log10(signal / noise)) if signal else -np.inf


def _ranks_classes(output: np.ndarray) -> bool:
    """Whether the largest element is a class: one vector of at least two, as classifiers give."""
    return output.dtype.kind in "fiu" and output.size > 1 and output.size == max(output.shape)
