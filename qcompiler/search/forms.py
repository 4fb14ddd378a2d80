"""The formats a layer may have, and how they are written.

``int4``      weights of 4 bits, activations as asked for the whole model
``int4/32``   in groups of 32 that share a scale
``int16*int4``  the layer reads 16-bit activations
``int16``     the same of an operator without weights, which else is ``int8``
``float16``, ``bfloat16``, ``float``  the layer stays in floating point, on the CPU
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from qcompiler.quant.types import HalfType, WeightType

LayerFormat = str
"""As above."""
FLOAT: LayerFormat = "float"
UNIFORM: LayerFormat = "int8"
"""What every layer has unless something else is chosen."""
WIDE = "int16"

RealType = HalfType | Literal["float"]


@dataclass(frozen=True)
class Form:
    """What a format says."""

    weights: WeightType = "int8"
    group: int = 0
    """Weights that share a scale; 0 for all of an output channel."""
    wide: bool = False
    """Whether the layer reads 16 bits, in a model whose activations have 8."""
    real: RealType | None = None
    """The floating-point type of a layer that has one."""

    @property
    def stored(self) -> LayerFormat:
        """The part about weights."""
        return f"{self.weights}/{self.group}" if self.group else self.weights

    def named(self, *, weighted: bool) -> LayerFormat:
        """As above."""
        if self.real is not None:
            return self.real
        if not weighted:
            return WIDE if self.wide else UNIFORM
        return f"{WIDE}*{self.stored}" if self.wide else self.stored


@cache
def form_of(name: LayerFormat) -> Form:
    """The inverse of `Form.named`."""
    if name in get_args(HalfType) or name == FLOAT:
        kinds: dict[str, RealType] = {"float16": "float16", "bfloat16": "bfloat16", "float": "float"}
        return Form(real=kinds[name])
    if name == WIDE:
        return Form(wide=True)
    read, _, stored = name.rpartition("*")
    weights, _, size = stored.partition("/")
    known: dict[str, WeightType] = {kind: kind for kind in get_args(WeightType)}
    return Form(known[weights], int(size or 0), read == WIDE)
