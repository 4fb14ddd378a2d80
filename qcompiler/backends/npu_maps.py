"""The feature maps of a region: when they are in use, where operators find their parts, what may run in stripes."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.backends.npu_cascade import Access, Operator
from qcompiler.backends.npu_layers import Recipe
from qcompiler.backends.npu_layout import Layout, engine_strides, operand_strides
from qcompiler.backends.npu_tiling import MapOperand, Same, Strides4, Work
from qcompiler.graph import dtype_of, element_count, shape_of
from qcompiler.partition import Region


@dataclass(frozen=True)
class Life:
    """When a root made inside the region is in use: first and last step."""

    first: int
    last: int
    reads: int


class RegionMaps:
    """What planning asks of a region, apart from how it is cut."""

    def __init__(self, region: Region, recipes: Sequence[Recipe], layout: Layout) -> None:
        self.region, self.recipes, self.layout = region, recipes, layout
        self.inside = {value: index for index, node in enumerate(region.nodes) for value in node.outputs}
        self.outputs = frozenset(self.root(value) for value in region.outputs)
        self.lives, self.writers = self._lives()
        self.sizes = {root: root_bytes(root) for root in self.lives}
        self.operators = tuple(self._operator(step) for step in range(len(recipes)))
        """By step, what is computed."""
        self.stripable = tuple(self._is_stripable(step) for step in range(len(recipes)))
        """Steps that may be part of a cascade."""
        self.only_views = tuple(
            not isinstance(recipe, Work) and recipe.fill is None and not layout.copies[step]
            for step, recipe in enumerate(recipes)
        )
        """Steps that do nothing."""

    def root(self, value: ir.Value | None) -> ir.Value:
        assert value is not None
        return self.layout.views[value].root

    def roots(self, step: int) -> tuple[ir.Value, ...]:
        """Of a work's operands and, last, of its OFM."""
        node, work = self.region.nodes[step], self.recipes[step]
        assert isinstance(work, Work), "moves read and write as they like"
        return (*(self.root(node.inputs[operand.source]) for operand in work.maps), self.root(node.outputs[0]))

    def _lives(self) -> tuple[dict[ir.Value, Life], dict[ir.Value, int]]:
        """When the roots made inside the region are in use, and how many steps write to each."""
        steps: dict[ir.Value, list[int]] = {}
        reads: dict[ir.Value, int] = {}
        writers: dict[ir.Value, int] = {}
        for index, (node, recipe) in enumerate(zip(self.region.nodes, self.recipes, strict=True)):
            if isinstance(recipe, Work):
                sources, outputs = [operand.source for operand in recipe.maps], [0]
            else:
                copies = self.layout.copies[index]
                sources = [copy.source for copy in copies]
                outputs = [copy.output for copy in copies] + ([0] if recipe.fill is not None else [])
            for root in {self.root(node.outputs[output]) for output in outputs}:
                steps.setdefault(root, []).append(index)
                writers[root] = writers.get(root, 0) + 1
            for source in sources:
                root = self.root(node.inputs[source])
                reads[root] = reads.get(root, 0) + 1
                steps.setdefault(root, []).append(index)
        for value in self.region.outputs:
            steps[self.root(value)].append(self.inside[value])
        # A value may also be a view of an input or a constant, which have homes already.
        lives = {
            root: Life(min(used), max(used), reads.get(root, 0)) for root, used in steps.items() if root in self.inside
        }
        return lives, writers

    # --- parts of roots ---

    def read(self, step: int, operand: MapOperand) -> tuple[int, Strides4]:
        """Offset and strides in bytes of an operand in its root."""
        value = self.region.nodes[step].inputs[operand.source]
        assert value is not None
        strides = operand_strides(shape_of(value), self.layout.views[value].strides, operand)
        assert strides is not None, f"{value.name} was laid out so that its users cannot follow"
        return self.layout.views[value].offset * operand.element, in_bytes(strides, operand.element)

    def written(self, step: int, work: Work) -> tuple[int, Strides4]:
        """The same of an OFM."""
        value = self.region.nodes[step].outputs[0]
        strides = engine_strides(shape_of(value), self.layout.views[value].strides, work.ofm)
        assert strides is not None, f"{value.name} was laid out so that its producer cannot follow"
        return self.layout.views[value].offset * work.element, in_bytes(strides, work.element)

    def _operator(self, step: int) -> Operator | None:
        work = self.recipes[step]
        if not isinstance(work, Work):
            return None
        *sources, target = self.roots(step)
        maps = tuple(
            _access(root, *self.read(step, operand), operand, work)
            for root, operand in zip(sources, work.maps, strict=True)
        )
        return Operator(step, work, maps, _access(target, *self.written(step, work), None, work))

    def _is_stripable(self, step: int) -> bool:
        work = self.recipes[step]
        if not isinstance(work, Work) or work.ofm[0] != 1 or "y" not in work.tiled:
            return False
        return not any(operand.transposed or operand.shape[0] != 1 for operand in work.maps)

    def is_inside(self, root: ir.Value, first: int, last: int) -> bool:
        """Whether nobody outside a run of steps needs a map."""
        life = self.lives.get(root)
        return life is not None and root not in self.outputs and first <= life.first and life.last <= last


def _access(root: ir.Value, offset: int, strides: Strides4, operand: MapOperand | None, work: Work) -> Access:
    shape, element = (work.ofm, work.element) if operand is None else (operand.shape, operand.element)
    whole = shape_of(root)
    pitch = whole[2] * whole[3] * element if len(whole) == 4 and whole[0] == 1 else 0
    _, rows, columns, depth = shape
    inside = offset + (columns - 1) * strides[2] + depth * element <= pitch
    rolls = pitch > 0 and rows == whole[1] and (rows == 1 or strides[1] == pitch) and inside
    return Access(root, offset, strides, shape, operand.y if operand else Same(), element, pitch, rolls)


def in_bytes(strides: Strides4, element: int) -> Strides4:
    n, y, x, c = strides
    return n * element, y * element, x * element, c * element


def root_bytes(root: ir.Value) -> int:
    return element_count(shape_of(root)) * dtype_of(root).itemsize
