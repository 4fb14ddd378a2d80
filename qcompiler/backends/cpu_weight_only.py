"""Products of float activations by integer weights with a scale per group, on the CPU."""

from typing import Any

import numpy as np
import onnx_ir as ir
from tvm.script import tirx as T  # noqa: N812 (TVMScript goes by this name)

from qcompiler.backends.base import HostCode, Kernel
from qcompiler.backends.cpu_elementwise import constant_input
from qcompiler.backends.schedules.loops import threads_for
from qcompiler.backends.schedules.weight_only import Dot, Form, float_kernel, integer_kernel, row_tile
from qcompiler.graph import data_input, shape_of
from qcompiler.integer.ops import WeightOnlyGemm

_FOUR_BITS = ("int4", "uint4")


def weight_only_gemm(node: ir.Node, host: HostCode) -> Kernel:
    """Weights stay packed in memory; a kernel unpacks them into registers as it goes."""
    op = WeightOnlyGemm.of(node)
    (rows, depth), outputs = shape_of(data_input(node)), shape_of(node.outputs[0])[1]
    weights, scale, zero_point, bias = (constant_input(node, index) for index in range(1, 5))
    lanes, signed, dot = _dot(host) if op.compute == "int8" else (host.vector_bytes // 4, False, None)
    bits = 4 if str(weights.dtype) in _FOUR_BITS else 8
    per_word = 32 // bits
    # A single group may end anywhere; zeros fill up its last word.
    group = -(-min(op.group, depth) // per_word) * per_word
    assert scale.shape[1] == 1 or group == op.group, f"{node.name}: groups of {op.group} share words"
    codes, zeros = _codes(weights, zero_point, bits, signed=signed)
    uniform = int(zeros.flat[0]) if (zeros == zeros.flat[0]).all() else None
    registers = 32 if host.vector_bytes == 64 or lanes == 4 else 16
    threads = threads_for(host, float(rows) * depth * outputs, 4 * lanes if dot is not None else lanes)
    form = Form(rows, depth, outputs, group, bits, lanes, uniform, row_tile(rows, registers), threads)
    function = float_kernel(form) if op.compute == "float32" else integer_kernel(form, dot or _plain_dot(lanes))
    parameters = (
        pack_words(codes, form),
        per_lane(scale.astype(np.float32), form),
        np.zeros((1, 1, 1), np.int32) if uniform is not None else per_lane(zeros.astype(np.int32), form),
        per_lane(bias.reshape(-1, 1).astype(np.float32), form)[:, 0],
    )
    return Kernel(function, (data_input(node),), parameters)


def _codes(weights: np.ndarray, zero_point: np.ndarray, bits: int, *, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Weights and zero points as the kernels want them: not negative, or int8 for a `signed` dot product of bytes."""
    values, zeros = weights.astype(np.int32), zero_point.astype(np.int32)
    wanted = -128 if signed and bits == 8 else 0
    stored = 0 if str(weights.dtype).startswith("u") else -(1 << (bits - 1))
    return (values + (wanted - stored)).astype(np.uint8), zeros + (wanted - stored)


def pack_words(codes: np.ndarray, form: Form) -> np.ndarray:
    """Codes [outputs, depth] as `Form.word_shape` int32, filled up with zeros."""
    full = np.zeros((form.blocks * form.lanes, form.padded_depth), np.uint8)
    full[: codes.shape[0], : codes.shape[1]] = codes
    split = full.reshape(form.blocks, form.lanes, -1, form.per_word)
    packed = split if form.bits == 8 else split[..., :4] | split[..., 4:] << 4
    return np.ascontiguousarray(np.ascontiguousarray(packed).view("<i4")[..., 0].transpose(0, 2, 1))


def per_lane(parameter: np.ndarray, form: Form) -> np.ndarray:
    """[outputs, groups] as [blocks, groups, lanes], filled up with zeros."""
    full = np.zeros((form.blocks * form.lanes, parameter.shape[1]), parameter.dtype)
    full[: parameter.shape[0]] = parameter
    return np.ascontiguousarray(full.reshape(form.blocks, form.lanes, -1).transpose(0, 2, 1))


# --- dot products ----------------------------------------------------------------------------------------------


def _dot(host: HostCode) -> tuple[int, bool, Dot | None]:
    """Lanes, whether weights are signed bytes, and the instruction; without one, lanes of the CPU's vectors."""
    for feature, lanes, signed, instruction in _INSTRUCTIONS:
        if feature in host.features:
            return lanes, signed, _intrinsic(lanes, instruction)
    return host.vector_bytes // 4, False, None


_INSTRUCTIONS = (
    ("avx512vnni", 16, False, "llvm.x86.avx512.vpdpbusd.512"),
    ("avxvnni", 8, False, "llvm.x86.avx512.vpdpbusd.256"),
    ("dotprod", 4, True, "llvm.aarch64.neon.sdot.v4i32.v16i8"),
)
"""CPU feature, lanes, whether both factors are signed, LLVM's name; the first the CPU has."""


def _intrinsic(lanes: int, instruction: str) -> Dot:
    def dot(sums: Any, weights: Any, activations: Any) -> Any:
        return T.call_llvm_pure_intrin(
            T.llvm_lookup_intrinsic_id(instruction),
            sums,
            T.reinterpret(weights, dtype=f"int8x{4 * lanes}"),
            T.reinterpret(T.broadcast(activations, lanes), dtype=f"int8x{4 * lanes}"),
            dtype=f"int32x{lanes}",
        )

    return dot


def _plain_dot(lanes: int) -> Dot:
    """Byte by byte in 32 bits, for CPUs without a dot product: unsigned weights, signed activations."""

    def byte(word: Any, position: int, *, signed: bool) -> Any:
        if signed:
            return T.shift_right(T.shift_left(word, T.int32(24 - 8 * position)), T.int32(24))
        moved = T.shift_right(word, T.broadcast(T.int32(8 * position), lanes))
        return T.bitwise_and(moved, T.broadcast(T.int32(255), lanes))

    def dot(sums: Any, weights: Any, activations: Any) -> Any:
        for position in range(4):
            factor = T.broadcast(byte(activations, position, signed=True), lanes)
            sums = sums + byte(weights, position, signed=False) * factor
        return sums

    return dot
