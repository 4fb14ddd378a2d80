"""Where the values of a region live relative to each other: views instead of copies.

A Reshape, Slice, Split or Transpose need not move anything if everyone who reads its output can follow the
strides, and the inputs of a Concat can be written straight into its output. Each value ends up as a strided view
of one buffer, its root; what remains to be moved is listed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.backends.npu_layers import Copy, Moves, Recipe
from qcompiler.backends.npu_tiling import Dims4, MapOperand, Strides4, Work
from qcompiler.graph import Shape, shape_of
from qcompiler.partition import Region

Strides = tuple[int, ...]


@dataclass(frozen=True)
class View:
    """A value as elements of its root: element i is the root's number offset + Σ i_k * strides_k.

    Movement keeps types, so that elements of both have one size.
    """

    root: ir.Value
    offset: int
    strides: Strides


@dataclass(frozen=True)
class Layout:
    """The outcome for one region."""

    views: Mapping[ir.Value, View]
    copies: tuple[tuple[Copy, ...], ...]
    """Per node: what still has to be copied."""


def dense_strides(shape: Shape) -> Strides:
    strides = [1] * len(shape)
    for axis in reversed(range(len(shape) - 1)):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    return tuple(strides)


def restride(shape: Shape, strides: Strides, target: Shape) -> Strides | None:
    """Strides that show the same elements in the shape `target`, or None if only a copy can.

    Axes of length 1 get the stride a dense tensor would have there.
    """
    # Runs of axes that are one contiguous sequence, outermost first: [elements, stride of the last axis].
    runs: list[list[int]] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = [runs[-1][0] * size, stride]
        else:
            runs.append([size, stride])
    result = [0] * len(target)
    inner = 1
    for axis in reversed(range(len(target))):
        size = target[axis]
        if not runs:
            result[axis] = inner
            continue
        elements, stride = runs[-1]
        result[axis] = stride
        inner = stride * size
        if elements % size:
            return None
        runs[-1] = [elements // size, inner]
        if runs[-1][0] == 1:
            runs.pop()
    return tuple(result)


def is_dense(shape: Shape, strides: Strides) -> bool:
    return all(
        size == 1 or stride == dense for size, stride, dense in zip(shape, strides, dense_strides(shape), strict=True)
    )


def plan_layout(region: Region, recipes: Sequence[Recipe]) -> Layout:
    return _Planner(region, recipes).plan()


class _Planner:
    def __init__(self, region: Region, recipes: Sequence[Recipe]) -> None:
        self.region = region
        self.recipes = recipes
        self.inside = {value: index for index, node in enumerate(region.nodes) for value in node.outputs}
        self.parents: dict[ir.Value, tuple[ir.Value, int, Strides]] = {}
        """Views: the value seen through, offset in it, own strides; in elements."""
        self.omitted: set[tuple[int, Copy]] = set()
        """Copies that views made superfluous, with their node."""

    def plan(self) -> Layout:
        for index, recipe in enumerate(self.recipes):
            if isinstance(recipe, Moves) and recipe.fill is None:
                for output in range(len(self.region.nodes[index].outputs)):
                    self._try_view(index, recipe, output)
        for index in reversed(range(len(self.recipes))):
            recipe = self.recipes[index]
            if isinstance(recipe, Moves) and recipe.fill is None:
                for copy in recipe.copies:
                    self._try_embed(index, recipe, copy)
        values = [*self.region.inputs, *self.inside]
        values += [value for node in self.region.nodes for value in node.inputs if value is not None]
        copies = tuple(
            tuple(copy for copy in recipe.copies if (index, copy) not in self.omitted)
            if isinstance(recipe, Moves)
            else ()
            for index, recipe in enumerate(self.recipes)
        )
        return Layout({value: self._resolve(value) for value in values}, copies)

    def _resolve(self, value: ir.Value) -> View:
        parent = self.parents.get(value)
        if parent is None:
            return View(value, 0, dense_strides(shape_of(value)))
        outer = self._resolve(parent[0])
        return View(outer.root, outer.offset + parent[1], parent[2])

    # --- an output that is a view of its input ---

    def _try_view(self, index: int, recipe: Moves, output: int) -> None:
        node = self.region.nodes[index]
        value = node.outputs[output]
        copies = [copy for copy in recipe.copies if copy.output == output]
        if len(copies) != 1 or not copies[0].fills_output:
            return
        (copy,) = copies
        source = node.inputs[copy.source]
        assert source is not None
        view = self._resolve(source)
        seen = restride(shape_of(source), view.strides, copy.src_shape)
        if seen is None:
            return
        strides = tuple(seen[axis] * step for axis, step in zip(copy.src_axes, self._box_steps(copy), strict=True))
        offset = sum(start * seen[axis] for axis, start in enumerate(copy.src_start))
        own = restride(copy.dst_shape, strides, shape_of(value))
        if own is None or not self._readable(value, own):
            return
        # A region's output has a buffer of its own to fill: only a whole intermediate can stand for it.
        whole = is_dense(shape_of(value), own) and copy.reads_all and view.root in self.inside
        if value in self.region.outputs and not whole:
            return
        self.parents[value] = (source, offset, own)
        self.omitted.add((index, copy))

    @staticmethod
    def _box_steps(copy: Copy) -> tuple[int, ...]:
        return tuple(copy.src_step[axis] for axis in copy.src_axes)

    # --- an input that is written into the output ---

    def _try_embed(self, index: int, recipe: Moves, copy: Copy) -> None:
        node = self.region.nodes[index]
        source, value = node.inputs[copy.source], node.outputs[copy.output]
        assert source is not None
        if (index, copy) in self.omitted or not copy.reads_all or any(step != 1 for step in copy.src_step):
            return
        if source not in self.inside or source in self.parents or source in self.region.outputs:
            return
        if sum(other.source == copy.source for other in recipe.copies) > 1 or list(node.inputs).count(source) > 1:
            return
        outer = restride(shape_of(value), self._resolve(value).strides, copy.dst_shape)
        if outer is None:
            return
        offset = sum(start * stride for start, stride in zip(copy.dst_start, outer, strict=True))
        own = restride(copy.src_shape, outer, shape_of(source))
        if own is None:
            return
        viewed = any(parent is source for parent, _, _ in self.parents.values())
        if viewed and not is_dense(shape_of(source), own):
            return
        if not self._readable(source, own) or not self._writable(source, own):
            return
        self.parents[source] = (value, offset, own)
        self.omitted.add((index, copy))

    # --- what strides the operators can follow ---

    def _readable(self, value: ir.Value, strides: Strides) -> bool:
        if is_dense(shape_of(value), strides):
            return True
        return all(
            self._follows(self.recipes[index], input_index, value, strides)
            for index, node in enumerate(self.region.nodes)
            for input_index, source in enumerate(node.inputs)
            if source is value
        )

    @staticmethod
    def _follows(recipe: Recipe, input_index: int, value: ir.Value, strides: Strides) -> bool:
        if isinstance(recipe, Moves):
            shapes = [copy.src_shape for copy in recipe.copies if copy.source == input_index]
            return all(restride(shape_of(value), strides, shape) is not None for shape in shapes)
        operands = [operand for operand in recipe.maps if operand.source == input_index]
        return all(operand_strides(shape_of(value), strides, operand) is not None for operand in operands)

    def _writable(self, value: ir.Value, strides: Strides) -> bool:
        recipe = self.recipes[self.inside[value]]
        if isinstance(recipe, Work):
            return engine_strides(shape_of(value), strides, recipe.ofm) is not None
        if recipe.fill is not None:
            return False  # a fill is one run of bytes
        shapes = [
            copy.dst_shape
            for copy in recipe.copies
            if self.region.nodes[self.inside[value]].outputs[copy.output] is value
        ]
        return all(restride(shape_of(value), strides, shape) is not None for shape in shapes)


def engine_strides(shape: Shape, strides: Strides, target: Dims4) -> Strides4 | None:
    """`restride` to [N, H, W, C] for an engine, which wants the channels of a pixel side by side."""
    found = restride(shape, strides, target)
    if found is None or (target[3] > 1 and found[3] != 1):
        return None
    n, y, x, c = found
    return n, y, x, c


def operand_strides(shape: Shape, strides: Strides, operand: MapOperand) -> Strides4 | None:
    """The strides by which an engine reads an operand, or None if it cannot."""
    found = engine_strides(shape, strides, operand.memory_shape)
    if found is None or not operand.transposed:
        return found
    n, x, y, c = found
    return n, y, x, c
