"""Four bytes to a 32-bit word, the first lowest: how kernels load, compute on and store 8-bit tensors."""

from collections.abc import Sequence

import numpy as np

from qcompiler.backends import te
from qcompiler.backends.te import Expr

WORD = 4
"""Bytes of a word."""
SIGN_BITS = -0x7F7F7F80
"""0x80808080: turns uint8 into int8 less 128, four at a time."""


def byte_of(word: Expr, position: int, dtype: str) -> Expr:
    """Byte `position` of a word as int32, its sign extended for "int8"."""
    if dtype == "int8":
        return te.shift_right(te.shift_left(word, _int32(24 - 8 * position)), _int32(24))
    return te.bitwise_and(te.shift_right(word, _int32(8 * position)), _int32(0xFF))


def packed(elements: Sequence[Expr]) -> Expr:
    """Four integers of 8 bits as a word."""
    word: Expr | None = None
    for position, element in enumerate(elements):
        low = te.bitwise_and(element.astype("int32"), _int32(0xFF))
        shifted = te.shift_left(low, _int32(8 * position)) if position else low
        word = shifted if word is None else te.bitwise_or(word, shifted)
    assert word is not None
    return word


def repeated(byte: int) -> int:
    """The word of four equal bytes, as int32."""
    return int(np.full(WORD, byte & 0xFF, np.uint8).view(np.int32)[0])


def from_nibbles(half: Expr) -> Expr:
    """The four int4 in the low 16 bits of an int32, as a word of int8."""
    bytes_ = te.bitwise_and(te.bitwise_or(half, te.shift_left(half, _int32(8))), _int32(0x00FF00FF))
    nibbles = te.bitwise_and(te.bitwise_or(bytes_, te.shift_left(bytes_, _int32(4))), _int32(0x0F0F0F0F))
    # A nibble's sign, one, two, three and four bits higher up. No multiplication: signed overflow means nothing in C.
    sign = te.bitwise_and(nibbles, _int32(0x08080808))
    pair = te.bitwise_or(te.shift_left(sign, _int32(1)), te.shift_left(sign, _int32(2)))
    return te.bitwise_or(nibbles, te.bitwise_or(pair, te.shift_left(pair, _int32(2))))


def pack_words(bytes_: np.ndarray) -> np.ndarray:
    """int8 or uint8 [..., 4 n] as int32 [..., n]."""
    return np.ascontiguousarray(bytes_).view(np.int32)


def pack_nibbles(values: np.ndarray) -> np.ndarray:
    """int8 in [-8, 7] [..., 4 n] as uint16 [..., n]: value i in bits 4 i to 4 i + 3, which `from_nibbles` reads."""
    nibbles = (values.astype(np.int8).view(np.uint8) & 15).reshape(*values.shape[:-1], -1, 2)
    return np.ascontiguousarray(nibbles[..., 0] | nibbles[..., 1] << 4).view(np.uint16)


def _int32(value: int) -> Expr:
    return te.const(value, "int32")
