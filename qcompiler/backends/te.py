"""TVM's tensor expressions with types a checker can follow.

TVM attaches operators to its expression classes at run time and annotates most functions loosely, so
this module, and only this one, speaks to it untyped. Names are TVM's, or numpy's where TVM's would hide a builtin.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tvm import te as _te_module
from tvm import tirx as _tirx_module

_te: Any = _te_module
_tirx: Any = _tirx_module


class Expr(Protocol):
    """A scalar expression."""

    def astype(self, dtype: str) -> "Expr": ...
    def __add__(self, other: "Expr | float") -> "Expr": ...
    def __radd__(self, other: "Expr | float") -> "Expr": ...
    def __sub__(self, other: "Expr | float") -> "Expr": ...
    def __rsub__(self, other: "Expr | float") -> "Expr": ...
    def __mul__(self, other: "Expr | float") -> "Expr": ...
    def __rmul__(self, other: "Expr | float") -> "Expr": ...
    def __truediv__(self, other: "Expr | float") -> "Expr": ...
    def __rtruediv__(self, other: "Expr | float") -> "Expr": ...
    def __floordiv__(self, other: "Expr | int") -> "Expr": ...
    def __mod__(self, other: "Expr | int") -> "Expr": ...
    def __neg__(self) -> "Expr": ...
    def __lt__(self, other: "Expr | float") -> "Expr": ...
    def __le__(self, other: "Expr | float") -> "Expr": ...
    def __gt__(self, other: "Expr | float") -> "Expr": ...
    def __ge__(self, other: "Expr | float") -> "Expr": ...
    def equal(self, other: "Expr | float") -> "Expr": ...


class Tensor(Protocol):
    """A tensor: a placeholder or the result of `compute`."""

    @property
    def dtype(self) -> str: ...
    def __getitem__(self, index: "Expr | int | tuple[Expr | int, ...]") -> Expr: ...


# --- tensors -----------------------------------------------------------------------------------------------


def placeholder(shape: Sequence[int], dtype: str, name: str) -> Tensor:
    return _te.placeholder(tuple(shape), dtype, name)


def compute(shape: Sequence[int], element: Callable[..., Expr], name: str) -> Tensor:
    return _te.compute(tuple(shape), element, name)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    untyped: Any = tensor
    return tuple(int(dim) for dim in untyped.shape)


def prim_func(arguments: Sequence[Tensor]) -> _tirx_module.PrimFunc:
    """The function of inputs, then parameters, then outputs."""
    return _te.create_prim_func(list(arguments))


def reduce_axis(extent: int, name: str) -> Expr:
    return _te.reduce_axis((0, extent), name)


def reduce_sum(element: Expr, axis: Sequence[Expr]) -> Expr:
    return _te.sum(element, axis=list(axis))


def reduce_max(element: Expr, axis: Sequence[Expr]) -> Expr:
    return _te.max(element, axis=list(axis))


def reduce_min(element: Expr, axis: Sequence[Expr]) -> Expr:
    return _te.min(element, axis=list(axis))


def reduce_product(element: Expr, axis: Sequence[Expr]) -> Expr:
    product = _te.comm_reducer(lambda a, b: a * b, lambda dtype: _tirx.const(1, dtype), name="product")
    return product(element, axis=list(axis))


# --- scalars -----------------------------------------------------------------------------------------------


def const(value: float, dtype: str) -> Expr:
    return _tirx.const(value, dtype)


def like(value: float, expression: Expr) -> Expr:
    """A constant of an expression's type."""
    return _tirx.const(value, dtype_of(expression))


def dtype_of(expression: Expr) -> str:
    untyped: Any = expression
    # An element of a tensor is not an expression yet.
    return str(untyped.dtype if isinstance(untyped, _te_module.TensorSlice) else untyped.ty.dtype)


def minimum(a: Expr | float, b: Expr | float) -> Expr:
    return _tirx.min(a, b)


def maximum(a: Expr | float, b: Expr | float) -> Expr:
    return _tirx.max(a, b)


def clamp(x: Expr, low: float, high: float) -> Expr:
    return maximum(minimum(x, high), low)


def rint(x: Expr) -> Expr:
    """To the nearest whole number, ties to even."""
    return _tirx.nearbyint(x)


def reinterpret(x: Expr, dtype: str) -> Expr:
    """The same bits as another type of that width."""
    return _tirx.reinterpret(dtype, x)


def if_then_else(condition: Expr, then: Expr, otherwise: Expr) -> Expr:
    """Evaluates one side only: the other may be an access out of bounds."""
    return _tirx.if_then_else(condition, then, otherwise)


def inside(*conditions: Expr) -> Expr:
    """All conditions, marked for LoopPartition: loops are cut where they change, and the middle runs without tests."""
    return _tirx.likely(_tirx.all(*conditions))


def where(condition: Expr, then: Expr, otherwise: Expr) -> Expr:
    """Evaluates both sides."""
    return _tirx.Select(condition, then, otherwise)


def all_of(*conditions: Expr) -> Expr:
    return _tirx.all(*conditions)


def shift_left(x: Expr, bits: Expr) -> Expr:
    return _tirx.shift_left(x, bits)


def shift_right(x: Expr, bits: Expr) -> Expr:
    """Arithmetic for signed types."""
    return _tirx.shift_right(x, bits)


def bitwise_and(a: Expr, b: Expr) -> Expr:
    return _tirx.bitwise_and(a, b)


def bitwise_or(a: Expr, b: Expr) -> Expr:
    return _tirx.bitwise_or(a, b)


def bitwise_xor(a: Expr, b: Expr) -> Expr:
    return _tirx.bitwise_xor(a, b)


def call(function: str, dtype: str, *arguments: Expr) -> Expr:
    """A function of the generated language, without side effects."""
    return _tirx.call_pure_extern(dtype, function, *arguments)


def word_dot_name(length: int, dtype: str) -> str:
    """The name that stands for `word_dot` until a schedule replaces it by an instruction."""
    return f"qcompiler_dot_{length}_{dtype}"


def word_dot(a: Expr, b: Expr, length: int, dtype: str) -> Expr:
    """Σ of the products of `length` numbers packed in each word of 32 bits: of a type in a, signed in b."""
    return _tirx.call_pure_extern("int32", word_dot_name(length, dtype), a, b)


def truncated_divide(a: Expr, b: Expr) -> Expr:
    return _tirx.truncdiv(a, b)


def any_of(*conditions: Expr) -> Expr:
    return _tirx.any(*conditions)


def negate(condition: Expr) -> Expr:
    """Logical not."""
    return _tirx.Not(condition)


def not_equal(a: Expr, b: Expr) -> Expr:
    return _tirx.NE(a, b)


def exp(x: Expr) -> Expr:
    return _tirx.exp(x)


def log(x: Expr) -> Expr:
    return _tirx.log(x)


def log1p(x: Expr) -> Expr:
    return _tirx.log1p(x)


def sqrt(x: Expr) -> Expr:
    return _tirx.sqrt(x)


def tanh(x: Expr) -> Expr:
    return _tirx.tanh(x)


def erf(x: Expr) -> Expr:
    return _tirx.erf(x)


def power(x: Expr, y: Expr) -> Expr:
    return _tirx.power(x, y)


def floor(x: Expr) -> Expr:
    return _tirx.floor(x)


def ceil(x: Expr) -> Expr:
    return _tirx.ceil(x)


def absolute(x: Expr) -> Expr:
    return _tirx.abs(x)


def sin(x: Expr) -> Expr:
    return _tirx.sin(x)


def cos(x: Expr) -> Expr:
    return _tirx.cos(x)


def floor_modulo(x: Expr, y: Expr) -> Expr:
    return _tirx.floormod(x, y)


def truncated_modulo(x: Expr, y: Expr) -> Expr:
    """The remainder with the sign of x."""
    dtype = dtype_of(x)
    if dtype.startswith("float"):
        # TVM has no LLVM code for fmod; libm has.
        return _tirx.call_pure_extern(dtype, "fmodf" if dtype == "float32" else "fmod", x, y)
    return _tirx.truncmod(x, y)
