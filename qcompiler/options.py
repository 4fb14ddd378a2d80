"""How a model is to be compiled: what every command that quantizes one takes."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from qcompiler.quant.types import HalfType, PruneRequest, Quality, RangeMethod, Technique, WeightRequest

if TYPE_CHECKING:
    from qcompiler.dataset import ImageOptions

CalibrationSource = str | os.PathLike[str] | Mapping[str, np.ndarray]
InputShapes = Mapping[str, tuple[int, ...]]
WeightOperators = Literal["matmulnbits", "qdq"]
"""How a written model has products with weights in groups: see `quantized_file.quantize_file`."""


@dataclass(frozen=True)
class Options:
    """What a user may say beside the model and the target; the defaults are the command line's."""

    calibration: CalibrationSource | None = None
    """Arrays by input name (first axis samples), an .npz, a folder of arrays or of images. Without it ranges come
    from random inputs, and accuracy is not to be trusted; a quantized model needs none."""
    input_shapes: InputShapes = field(default_factory=dict)
    """Full shapes of inputs with symbolic dimensions."""
    method: RangeMethod = "mse"
    """How activation ranges are chosen from what calibration saw."""
    samples: int | None = None
    """Use the first so many calibration samples."""
    images: "ImageOptions | None" = None
    """Preprocessing, if `calibration` is a folder of images."""
    keep_float: Sequence[str] = ()
    """Names of operators to leave in float; "all" for every one."""
    half: Mapping[str, HalfType] = field(default_factory=dict)
    """Layers in 16-bit floats, by name; "all" for every one."""
    overrides: Sequence[str] = ()
    """Changes to the target spec, such as "memories.sram.size=512KiB"."""
    formats: WeightRequest = field(default_factory=WeightRequest)
    """Formats of weights and activations other than the target's first 8-bit ones."""
    prune: PruneRequest | None = None
    """Make so many weights zero first, and let the others make up for them."""
    quality: Quality = "fast"
    """"balanced" and "best" learn better weights and biases from the calibration data, layer by layer, in about a
    minute or ten at most."""
    without_repair: Sequence[Technique] = ()
    """Techniques that the quality includes and that are to be left out."""
    tiles: str | os.PathLike[str] | None = None
    """A database of `qcompile tune`: CPU kernels take the tiles that were measured best. Not needed to exist."""
    dump: str | os.PathLike[str] | None = None
    """A folder that receives the graph after every stage."""
