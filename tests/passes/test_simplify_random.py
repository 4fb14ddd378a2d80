"""Random networks through the whole simplification: every pass settles, keeps the graph valid and the numbers."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.pipeline import SIMPLIFY
from qcompiler.verify import verify

Shape = list[int]
Tensor = tuple[str, Shape]


class Writer:
    """Appends random operators to a graph; each method takes a tensor and returns what it makes of it."""

    def __init__(self, net, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.n = net(seed)
        self.made: list[Tensor] = []

    def _below(self, limit: int) -> int:
        return int(self.rng.integers(limit))

    def transpose(self, x: str, shape: Shape) -> Tensor:
        perm = self.rng.permutation(len(shape)).tolist()
        return self.n.op("Transpose", x, perm=perm), [shape[axis] for axis in perm]

    def reshape(self, x: str, shape: Shape) -> Tensor:
        sizes = [1]
        rest = int(np.prod(shape))
        for _ in range(2):
            divisors = [size for size in range(1, rest + 1) if rest % size == 0]
            sizes.append(divisors[self._below(len(divisors))])
            rest //= sizes[-1]
        wanted = [*sizes, rest][self._below(2) :]
        return self.n.op("Reshape", x, self.n.const(wanted, np.int64)), wanted

    def cut(self, x: str, shape: Shape) -> Tensor:
        axis, step = self._below(len(shape)), 1 + self._below(2)
        start = self._below(shape[axis])
        bounds = (self.n.const([number], np.int64) for number in (start, shape[axis], axis, step))
        kept = -(-(shape[axis] - start) // step)
        return self.n.op("Slice", x, *bounds), [*shape[:axis], kept, *shape[axis + 1 :]]

    def activation(self, x: str, shape: Shape) -> Tensor:
        if self._below(2):
            return self.n.op("Relu", x), shape
        return self.n.op("Clip", x, self.n.const(-self._below(2)), self.n.const(6)), shape

    def affine(self, x: str, shape: Shape) -> Tensor:
        sizes = [size if self._below(2) else 1 for size in shape][self._below(len(shape)) :]
        operands = [x, self.n.weight(*sizes)]
        return self.n.op(
            str(self.rng.choice(["Add", "Sub", "Mul"])), *(operands if self._below(3) else operands[::-1])
        ), shape

    def quantized(self, x: str, shape: Shape) -> Tensor:
        return self.n.qdq(x, scale=0.1), shape

    def conv(self, x: str, shape: Shape) -> Tensor:
        if len(shape) not in (3, 4) or shape[1] > 40:
            return x, shape
        spatial, outputs = len(shape) - 2, 2 + self._below(4)
        size = 3 if min(shape[2:]) > 2 and self._below(2) else 1
        weight = (outputs, shape[1], *[size] * spatial)
        w = self.n.weight(*weight) if self._below(2) else self.n.int8_weight(*weight, axis=0)
        pad = self._below(2) if size == 3 else 0
        result = self.n.op("Conv", x, w, pads=[pad] * (2 * spatial))
        return result, [shape[0], outputs, *(dim + 2 * pad - size + 1 for dim in shape[2:])]

    def norm(self, x: str, shape: Shape) -> Tensor:
        if len(shape) < 2:
            return x, shape
        parameters = [self.n.weight(shape[1]) for _ in range(3)]
        variance = self.n.const(self.rng.uniform(0.5, 2, shape[1]))
        return self.n.op("BatchNormalization", x, *parameters, variance), shape

    def matmul(self, x: str, shape: Shape) -> Tensor:
        if len(shape) < 2:
            return x, shape
        w = self.n.weight(shape[-1], 3) if self._below(2) else self.n.int8_weight(shape[-1], 3, axis=1)
        return self.n.op("MatMul", x, w), [*shape[:-1], 3]

    def mean(self, x: str, shape: Shape) -> Tensor:
        if len(shape) < 3:
            return x, shape
        axes, keep = sorted(self.rng.choice(len(shape), 2, replace=False).tolist()), self._below(2)
        kept = [1 if axis in axes else size for axis, size in enumerate(shape) if keep or axis not in axes]
        return self.n.op("ReduceMean", x, self.n.const(axes, np.int64), keepdims=keep), kept

    def pad(self, x: str, shape: Shape) -> Tensor:
        pads = self.rng.integers(0, 2, 2 * len(shape)) * (np.arange(2 * len(shape)) % len(shape) > 1)
        sizes = [size + int(pads[axis] + pads[len(shape) + axis]) for axis, size in enumerate(shape)]
        return self.n.op("Pad", x, self.n.const(pads, np.int64)), sizes

    def unsqueeze(self, x: str, shape: Shape) -> Tensor:
        return self.n.op("Unsqueeze", x, self.n.const([1], np.int64)), [shape[0], 1, *shape[1:]]

    def residual(self, x: str, shape: Shape) -> Tensor:
        same = [name for name, other in self.made if other == shape]
        return self.n.op("Add", x, same[self._below(len(same))]), shape

    def model(self):
        shape = [1, 2 + 2 * self._below(3), 3 + self._below(4), 3 + self._below(4)]
        self.made.append((self.n.input(*shape), shape))
        steps: tuple[Callable[[str, Shape], Tensor], ...] = (
            self.transpose, self.reshape, self.cut, self.activation, self.affine, self.quantized, self.conv, self.norm,
            self.matmul, self.mean, self.pad, self.unsqueeze, self.residual,
        )  # fmt: skip
        for _ in range(5 + self._below(9)):
            # Mostly a chain, at times a branch.
            source = self.made[-1] if self._below(5) else self.made[self._below(len(self.made))]
            self.made.append(steps[self._below(len(steps))](*source))
        return self.n.model(*dict.fromkeys((self.n.op("Tanh", self.made[-1][0]), self.n.op("Neg", self.made[-2][0]))))


class Everything(ir.passes.InPlacePass):
    """`SIMPLIFY`, each pass checked as it goes."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for change in SIMPLIFY:
            change(model)
            verify(model, type(change).__name__)
            assert not change(model).modified, f"{type(change).__name__} does not settle"
        return ir.passes.PassResult(model, modified=True)


@pytest.mark.parametrize("seed", range(80))
def test_random_network(net, apply, seed):
    assert apply(Writer(net, seed).model(), Everything()).largest_error() < 1e-4
