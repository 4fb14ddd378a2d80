"""A TOSA function under construction, in MLIR's generic textual form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler.graph import Shape, element_count

_ELEMENTS: dict[str, str] = {"int8": "i8", "int32": "i32"}
UNIT_SHIFT = 30
"""RESCALE by 2^UNIT_SHIFT and back: the factor one. Shorter shifts multiply by powers of two."""


@dataclass(frozen=True)
class Tensor:
    """An SSA value."""

    name: str
    shape: Shape
    dtype: str

    @property
    def type(self) -> str:
        dims = "x".join(map(str, self.shape))
        return f"tensor<{dims}x{_ELEMENTS[self.dtype]}>" if self.shape else f"tensor<{_ELEMENTS[self.dtype]}>"


@dataclass(frozen=True)
class Scale:
    """The factor multiplier * 2^-shift of a RESCALE, one or one per channel of the last axis."""

    multiplier: np.ndarray
    shift: np.ndarray
    rounding: str
    """SINGLE_ROUND or DOUBLE_ROUND."""


def power_of_two(exponent: int) -> Scale:
    """The factor 2^exponent, exact or rounded half up. RESCALE wants inputs below 2^(29 - exponent)."""
    return Scale(np.array([1 << UNIT_SHIFT]), np.array([UNIT_SHIFT - exponent]), "SINGLE_ROUND")


class TosaText:
    """Writes one operation a line. Constants are shared."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._constants: dict[tuple[str, Shape, bytes], Tensor] = {}
        self._shapes: dict[Shape, str] = {}
        self._count = 0

    def op(
        self,
        name: str,
        inputs: Sequence[Tensor | str],
        shape: Shape,
        dtype: str,
        attributes: Mapping[str, str] | None = None,
    ) -> Tensor:
        """`inputs`: tensors, and names of shapes from `shape_constant`."""
        output = Tensor(self._fresh(), shape, dtype)
        operands = ", ".join(item if isinstance(item, str) else item.name for item in inputs)
        types = ", ".join(self._shape_type(item) if isinstance(item, str) else item.type for item in inputs)
        listed = ", ".join(f"{key} = {value}" for key, value in (attributes or {}).items())
        properties = f" <{{{listed}}}>" if listed else ""
        self._lines.append(f'{output.name} = "tosa.{name}"({operands}){properties} : ({types}) -> {output.type}')
        return output

    def constant(self, array: np.ndarray, dtype: str) -> Tensor:
        packed = np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<"))
        key = (dtype, packed.shape, packed.tobytes())
        if key not in self._constants:
            made = Tensor(self._fresh(), packed.shape, dtype)
            values = f'dense<"0x{packed.tobytes().hex().upper()}"> : {made.type}'
            self._lines.append(f'{made.name} = "tosa.const"() <{{values = {values}}}> : () -> {made.type}')
            self._constants[key] = made
        return self._constants[key]

    def number(self, value: int, dtype: str, rank: int = 1) -> Tensor:
        """A tensor of one element."""
        return self.constant(np.full((1,) * rank, value), dtype)

    def shape_constant(self, dims: Sequence[int]) -> str:
        key = tuple(int(dim) for dim in dims)
        if key not in self._shapes:
            name = self._fresh()
            listed = ", ".join(map(str, key))
            self._lines.append(
                f'{name} = "tosa.const_shape"() <{{values = dense<[{listed}]> : tensor<{len(key)}xindex>}}> : '
                f"() -> !tosa.shape<{len(key)}>"
            )
            self._shapes[key] = name
        return self._shapes[key]

    def rescale(
        self,
        x: Tensor,
        scale: Scale,
        dtype: str,
        *,
        x_zero_point: int = 0,
        y_zero_point: int = 0,
        from_unsigned: bool = False,
        to_unsigned: bool = False,
    ) -> Tensor:
        """saturate((x - x_zero_point) * scale + y_zero_point)."""
        per_channel = scale.multiplier.size > 1
        inputs = [
            x,
            self.constant(scale.multiplier, "int32"),
            self.constant(scale.shift, "int8"),
            self.number(x_zero_point, x.dtype),
            self.number(y_zero_point, dtype),
        ]
        attributes = {
            "input_unsigned": _boolean(from_unsigned),
            "output_unsigned": _boolean(to_unsigned),
            "per_channel": _boolean(per_channel),
            "rounding_mode": f"#tosa.rounding_mode<{scale.rounding}>",
            "scale32": "true",
        }
        return self.op("rescale", inputs, x.shape, dtype, attributes)

    def reshape(self, x: Tensor, shape: Shape) -> Tensor:
        if x.shape == shape:
            return x
        assert element_count(x.shape) == element_count(shape)
        return self.op("reshape", [x, self.shape_constant(shape)], shape, x.dtype)

    def transpose(self, x: Tensor, perm: Sequence[int]) -> Tensor:
        shape = tuple(x.shape[axis] for axis in perm)
        return self.op("transpose", [x], shape, x.dtype, {"perms": f"array<i32: {_listed(perm)}>"})

    def slice(self, x: Tensor, start: Sequence[int], size: Shape) -> Tensor:
        if x.shape == tuple(size):
            return x
        return self.op("slice", [x, self.shape_constant(start), self.shape_constant(size)], tuple(size), x.dtype)

    def pad(self, x: Tensor, pads: np.ndarray, value: int) -> Tensor:
        """`pads`: [rank, 2], before and after each axis."""
        shape = tuple(int(size + sum(around)) for size, around in zip(x.shape, pads, strict=True))
        inputs = [x, self.shape_constant(pads.reshape(-1).tolist()), self.number(value, x.dtype)]
        return self.op("pad", inputs, shape, x.dtype)

    def module(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str:
        """The whole file; every input and output is one of the function's."""
        arguments = ", ".join(f"{item.name}: {item.type}" for item in inputs)
        types = ", ".join(item.type for item in outputs)
        names = ", ".join(item.name for item in outputs)
        lines = [*self._lines, f"return {names} : {types}"]
        body = "\n".join(f"    {line}" for line in lines)
        return f"module {{\n  func.func @main({arguments}) -> ({types}) {{\n{body}\n  }}\n}}\n"

    def argument(self, index: int, shape: Shape, dtype: str) -> Tensor:
        """An input of the function."""
        return Tensor(f"%arg{index}", shape, dtype)

    def _fresh(self) -> str:
        self._count += 1
        return f"%{self._count - 1}"

    def _shape_type(self, name: str) -> str:
        rank = next(len(dims) for dims, known in self._shapes.items() if known == name)
        return f"!tosa.shape<{rank}>"


def integers(numbers: Sequence[int]) -> str:
    """An attribute of 64-bit integers."""
    return f"array<i64: {_listed(numbers)}>"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(int(number)) for number in numbers)


def _boolean(value: bool) -> str:
    return "true" if value else "false"
