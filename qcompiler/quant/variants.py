"""More samples from few: images mirrored, and others cut out of the given ones.

Learning wants the float network's answers to many inputs, not labels, so any input will do that looks like those to
come. Of other tensors than images nobody knows what leaves them alike, so they stay as they are.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.graph import shape_of, value_name
from qcompiler.quant.moments import Sample

COLOURS = 3
SMALLEST_PART = 0.5
"""Of the area of an image, at least, is cut out."""
MOST_DISTORTION = 1.5
"""Width over height, against that of the image, at most; and the other way round."""


class Variants(Sequence[Sample]):
    """The samples, then all of them mirrored, then cut-outs; made when they are asked for, the same every time.

    Args:
        samples: of batch 1.
        model: whose inputs they are.
        times: how many variants; of models that read no images, or something else besides, there are none.
    """

    def __init__(self, samples: Sequence[Sample], model: ir.Model, times: int) -> None:
        self._samples = samples
        axes = {value_name(value): image_axes(shape_of(value)) for value in model.graph.inputs}
        known = {name: found for name, found in axes.items() if found is not None}
        self._axes = known if len(known) == len(axes) == 1 else {}
        self._times = times if self._axes else 0

    def __len__(self) -> int:
        return len(self._samples) * (1 + self._times)

    def __getitem__(self, index: int) -> Sample:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):
            raise IndexError(index)
        variant, place = divmod(index, len(self._samples))
        sample = self._samples[place]
        if variant == 0:
            return sample
        if variant == 1:
            return _mirrored(sample, self._axes)
        chance = np.random.default_rng(index)
        part = _part(sample, self._axes, chance)
        return _mirrored(part, self._axes) if chance.random() < 0.5 else part


def image_axes(shape: Sequence[int]) -> tuple[int, int] | None:
    """The axes of an image's rows and columns; None unless it has three channels, first or last, and larger sides."""
    if len(shape) != 4:
        return None
    for channels, rows, columns in ((1, 2, 3), (3, 1, 2)):
        if shape[channels] == COLOURS and min(shape[rows], shape[columns]) > COLOURS:
            return rows, columns
    return None


def _mirrored(sample: Sample, axes: Mapping[str, tuple[int, int]]) -> Sample:
    """Left for right."""
    flipped = {name: np.ascontiguousarray(np.flip(sample[name], columns)) for name, (_, columns) in axes.items()}
    return {**sample, **flipped}


def _part(sample: Sample, axes: Mapping[str, tuple[int, int]], chance: np.random.Generator) -> Sample:
    changed = dict(sample)
    for name, (rows, columns) in axes.items():
        side, distortion = np.sqrt(chance.uniform(SMALLEST_PART, 1)), np.sqrt(MOST_DISTORTION ** chance.uniform(-1, 1))
        image = _stretched(sample[name], rows, min(1.0, side * distortion), chance.random())
        changed[name] = _stretched(image, columns, min(1.0, side / distortion), chance.random())
    return changed


def _stretched(image: np.ndarray, axis: int, part: float, place: float) -> np.ndarray:
    """A part of the image at a `place` of 0 to 1, in the size of all of it, linearly interpolated along one axis."""
    size = image.shape[axis]
    position = (1 - part) * size * place + (np.arange(size) + 0.5) * part - 0.5
    position = np.clip(position, 0, size - 1)
    before = np.floor(position).astype(np.int64)
    after = np.minimum(before + 1, size - 1)
    weight = (position - before).astype(np.float32).reshape([-1 if index == axis else 1 for index in range(image.ndim)])
    mixed = np.take(image, before, axis) * (1 - weight) + np.take(image, after, axis) * weight
    return (mixed if np.issubdtype(image.dtype, np.floating) else np.rint(mixed)).astype(image.dtype)
