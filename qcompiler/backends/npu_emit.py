"""Two ways to run one driver generator: write TIR, or produce the command words at once.

The generator's loops and conditions are generators themselves, so that plain Python reads the same for both:

    for tile in emit.loop(count):
        for _ in emit.when(emit.equal(emit.mod(tile, 4), 0)):
            emit.call(isa.DMA, …)

`TirEmitter` opens a TIR frame and runs the body once with a loop variable; `WordEmitter` runs it for
each integer. Numbers are `Index`: an int where it is known, else a TIR expression.
"""

from collections.abc import Iterator
from typing import Any, Protocol, cast

from tvm import tirx as _tirx
from tvm.script.ir_builder import tirx as _builder

from qcompiler.simulator.isa import Opcode

# TVM's annotations do not describe its expressions; `Symbol` says what is used of them.
tirx: Any = _tirx
builder: Any = _builder


class Symbol(Protocol):
    """A TIR expression of type int32."""

    def __add__(self, other: "Index", /) -> "Symbol": ...
    def __radd__(self, other: "Index", /) -> "Symbol": ...
    def __sub__(self, other: "Index", /) -> "Symbol": ...
    def __rsub__(self, other: "Index", /) -> "Symbol": ...
    def __mul__(self, other: "Index", /) -> "Symbol": ...
    def __rmul__(self, other: "Index", /) -> "Symbol": ...


Index = int | Symbol


Condition = bool | Symbol


class Emitter(Protocol):
    def call(self, opcode: Opcode, *arguments: Index) -> None:
        """Issue one command."""
        ...

    def loop(self, count: int) -> Iterator[Index]:
        """Repeat the body for 0 … count - 1."""
        ...

    def when(self, condition: Condition) -> Iterator[None]:
        """Run the body if the condition holds."""
        ...


class WordEmitter:
    """Records the words the simulator would log: code, arguments…"""

    def __init__(self) -> None:
        self.words: list[int] = []

    def call(self, opcode: Opcode, *arguments: Index) -> None:
        assert len(arguments) == len(opcode.arguments), f"{opcode.name} takes {opcode.arguments}"
        # No loop variable here is anything but an int.
        self.words += (opcode.code, *cast("tuple[int, ...]", arguments))

    def loop(self, count: int) -> Iterator[Index]:
        yield from range(count)

    def when(self, condition: Condition) -> Iterator[None]:
        assert isinstance(condition, bool)
        if condition:
            yield


class TirEmitter:
    """Writes into the PrimFunc under construction by `tvm.script.ir_builder`."""

    def call(self, opcode: Opcode, *arguments: Index) -> None:
        assert len(arguments) == len(opcode.arguments), f"{opcode.name} takes {opcode.arguments}"
        builder.evaluate(tirx.call_extern("int32", f"qrt_{opcode.name}", *arguments))

    def loop(self, count: int) -> Iterator[Index]:
        if count == 1:
            yield 0
        elif count > 1:
            with builder.serial(0, count) as index:
                yield index

    def when(self, condition: Condition) -> Iterator[None]:
        if isinstance(condition, bool):
            if condition:
                yield
        else:
            with builder.If(condition), builder.Then():
                yield


# Arithmetic on indices. TIR folds constants itself; ints stay ints so that the words need no TIR.


def minimum(a: Index, b: Index) -> Index:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else tirx.min(a, b)


def maximum(a: Index, b: Index) -> Index:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else tirx.max(a, b)


def divide(a: Index, b: int) -> Index:
    """Floor division by a positive number."""
    if b == 1:
        return a
    return a // b if isinstance(a, int) else tirx.floordiv(a, b)


def modulo(a: Index, b: int) -> Index:
    """Remainder of floor division by a positive number."""
    if b == 1:
        return 0
    return a % b if isinstance(a, int) else tirx.floormod(a, b)


def equal(a: Index, b: int) -> Condition:
    return a == b if isinstance(a, int) else tirx.EQ(a, tirx.const(b, "int32"))


def positive(a: Index) -> Condition:
    return a > 0 if isinstance(a, int) else tirx.GT(a, tirx.const(0, "int32"))


def select(condition: Condition, yes: Index, no: Index) -> Index:
    """One of two numbers, both of which are defined."""
    if isinstance(condition, bool):
        return yes if condition else no
    return tirx.Select(condition, *(tirx.const(a, "int32") if isinstance(a, int) else a for a in (yes, no)))
