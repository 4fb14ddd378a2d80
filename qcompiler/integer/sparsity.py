"""The 2:4 pattern: of every four weights that are neighbours along the input channels, at most two are not zero.

Hardware that knows it stores two weights of each four and where they stand, and multiplies no others.
"""

import numpy as np

BLOCK, KEPT = 4, 2


def is_2_of_4(weights: np.ndarray) -> bool:
    """Whether weights [..., channels] have the pattern."""
    if not weights.size or weights.shape[-1] % BLOCK:
        return False
    blocks = weights.reshape(-1, BLOCK)
    return bool(((blocks != 0).sum(axis=1) <= KEPT).all())


def pack_2_of_4(rows: np.ndarray) -> np.ndarray:
    """int8 rows of the pattern as `simulator.isa` stores them: uint8 [rows, 2.5 bytes a block, rounded up].

    A row's kept weights come first, two a block in their order; then a nibble a block, the first in the low nibble: the
    place of the first weight in its two low bits, that of the second above. Where fewer than two are not zero, zeros
    are kept.
    """
    blocks = rows.reshape(rows.shape[0], -1, BLOCK)
    # Places that hold something come first, in their order; then places of zeros.
    kept = np.sort(np.argsort(blocks == 0, axis=2, kind="stable")[..., :KEPT], axis=2)
    values = np.take_along_axis(blocks, kept, axis=2).reshape(rows.shape[0], -1).astype(np.int8).view(np.uint8)
    nibbles = (kept[..., 0] | kept[..., 1] << 2).astype(np.uint8)
    nibbles = np.concatenate([nibbles, np.zeros((rows.shape[0], nibbles.shape[1] % 2), np.uint8)], axis=1)
    return np.concatenate([values, nibbles[:, ::2] | nibbles[:, 1::2] << 4], axis=1)
