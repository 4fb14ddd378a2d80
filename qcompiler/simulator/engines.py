"""How long one command keeps a compute engine busy, and what it moves: closed forms per kind of engine.

Systolic arrays follow SCALE-Sim 3, dot arrays and vector units their rates; Ethos-U-like MAC arrays are in
`simulator.mac_array`. All cycles are of the accelerator's clock.
"""

from math import ceil

from qcompiler.simulator.mac_array import mac_array
from qcompiler.simulator.workload import Feed, Shape, Work
from qcompiler.target import DotArray, Engine, MacArray, Simd, Systolic


def work(shape: Shape, engine: Engine, precision: str, feed: Feed) -> Work:
    """Cycles and traffic of one command on an engine.

    `precision` is the pair ("int8*int8") of a command with weights, and unused without.
    """
    match engine.geometry:
        case MacArray():
            return mac_array(shape, engine.geometry, feed)
        case Systolic():
            return systolic(shape, engine.geometry, engine.precisions[precision].rate * shape.sparse_speedup)
        case DotArray():
            return dot_array(shape, engine.geometry, engine.precisions[precision].rate * shape.sparse_speedup)
        case Simd():
            rate = engine.precisions[precision].rate * shape.sparse_speedup if shape.has_weights else None
            return simd(shape, engine.geometry, rate)


# --- systolic arrays and vector units ------------------------------------------------------------------------


def weight_stationary_cycles(m: int, k: int, n: int, rows: int, cols: int) -> int:
    """[m,k] x [k,n] with weights held in the array: ⌈K/R⌉⌈N/C⌉(M + 2R + C - 2) - 1 (SCALE-Sim 3)."""
    return ceil(k / rows) * ceil(n / cols) * (m + 2 * rows + cols - 2) - 1


def output_stationary_cycles(m: int, k: int, n: int, rows: int, cols: int) -> int:
    """[m,k] x [k,n] with sums held in the array: ⌈M/R⌉⌈N/C⌉(K + R + C - 2) - 1 (SCALE-Sim 3)."""
    return ceil(m / rows) * ceil(n / cols) * (k + rows + cols - 2) - 1


def systolic(shape: Shape, array: Systolic, rate: float) -> Work:
    """A convolution as a matrix product of output pixels, window and output channels, group after group.

    A rate other than rows * cols scales the closed form: two int4 products a cell and cycle halve it.
    """
    assert shape.has_weights, f"a systolic array does not run {shape.op}"
    m, k, n = shape.ofm[0] * shape.ofm[1], shape.window * (shape.ifm[2] // shape.groups), shape.ofm[2] // shape.groups
    stationary = array.dataflow == "weight_stationary"
    closed_form = weight_stationary_cycles if stationary else output_stationary_cycles
    cycles = shape.groups * closed_form(m, k, n, array.rows, array.cols) * array.rows * array.cols / rate
    passes = ceil(n / array.cols)
    weight_passes = 1 if stationary else ceil(m / array.rows)
    return Work(
        cycles,
        ifm_bytes=shape.groups * m * k * passes * shape.ifm_bits / 8,
        weight_bytes=shape.weight_elements * weight_passes * shape.weight_bits / 8,
        ofm_bytes=shape.ofm_elements * shape.ofm_bits / 8,
    )


def dot_array(shape: Shape, array: DotArray, rate: float) -> Work:
    """One pixel, kernel element and chunk of input channels for a group of output channels a cycle.

    Inputs are read for every group of output channels, weights once.
    """
    assert shape.has_weights, f"a dot array does not run {shape.op}"
    pixels, (rows, columns) = shape.ofm[0] * shape.ofm[1], shape.kernel
    depth, kernels = shape.ifm[2] // shape.groups, ceil(shape.ofm[2] // shape.groups / array.kernels)
    chunks = columns * ceil(depth / array.channels)
    if depth <= array.image_channels:
        chunks = ceil(columns * depth / array.channels)
    steps = shape.groups * pixels * rows * chunks * kernels
    return Work(
        steps * array.channels * array.kernels / rate,
        ifm_bytes=shape.groups * pixels * shape.window * depth * kernels * shape.ifm_bits / 8,
        weight_bytes=shape.weight_elements * shape.weight_bits / 8,
        ofm_bytes=shape.ofm_elements * shape.ofm_bits / 8,
    )


_SIMD_CLASS: dict[str, str] = {
    "add": "elementwise",
    "mul": "elementwise",
    "requantize": "elementwise",
    "max_pool": "pool",
    "average_pool": "pool",
    "lookup": "lookup",
    "softmax": "softmax",
    "resize_nearest": "resize",
    "resize_linear": "resize",
}


def simd(shape: Shape, unit: Simd, mac_rate: float | None) -> Work:
    """Elements, window elements for pools or MACs, at the unit's rate; a class without a rate runs one lane each.

    Rates of elements are those of 8 bits: of wider ones a vector holds fewer.
    """
    if shape.has_weights:
        assert mac_rate is not None
        amount, rate = shape.macs, mac_rate
    else:
        kind = _SIMD_CLASS[shape.op]
        width = max(shape.ifm_bits, shape.ofm_bits) / 8
        amount = shape.ofm_elements * (shape.window if kind == "pool" else 1) * width
        rate = unit.element_rate.get(kind, unit.lanes)
    read = shape.ofm_elements * shape.window if shape.op in ("max_pool", "average_pool") else shape.ifm_elements
    if shape.has_weights:
        read = shape.macs * (1 if shape.op == "depthwise" else 1 / max(1, min(unit.lanes, shape.ofm[2])))
    return Work(
        amount / rate,
        ifm_bytes=read * shape.ifm_bits / 8,
        weight_bytes=shape.weight_elements * shape.weight_bits / 8,
        ofm_bytes=shape.ofm_elements * shape.ofm_bits / 8,
    )
