"""The classes that samples belong to."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from qcompiler.errors import QCompilerError
from qcompiler.options import CalibrationSource

NAMES = ("label", "labels")
"""Arrays that hold classes, in an .npz beside the model's inputs."""


def labels_beside(source: CalibrationSource | None, inputs: Sequence[str], count: int) -> np.ndarray | None:
    """The labels that lie beside samples: in the mapping or .npz, an array of integers called label or labels.

    Args:
        source: where the samples come from.
        inputs: names of the model's inputs, which are no labels.
        count: how many samples are used; the first so many labels count.

    Returns:
        int64 [count], or None if there are none.
    """
    found: np.ndarray | None = None
    if isinstance(source, Mapping):
        found = next((np.asarray(source[name]) for name in NAMES if name in source and name not in inputs), None)
    elif source is not None and Path(source).suffix == ".npz" and Path(source).is_file():
        with np.load(source, allow_pickle=False) as data:
            found = next((data[name] for name in NAMES if name in data.files and name not in inputs), None)
    if found is None or found.dtype.kind not in "iu" or found.size < count:
        return None
    return found.reshape(-1)[:count].astype(np.int64)


def read_labels(file: str | os.PathLike[str], count: int) -> np.ndarray:
    """One class per sample, from an .npy or from text with an integer a line.

    Raises:
        QCompilerError: not readable, or not as many as samples.
    """
    path = Path(file)
    try:
        found = (
            np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path, dtype=np.int64, ndmin=1)
        )
    except FileNotFoundError:
        raise QCompilerError(f"--labels {path} does not exist.") from None
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise QCompilerError(f"--labels {path}: {error}; give an .npy or a text file of one class per line.") from None
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu" or found.size != count:
        held = f"{found.size} values of {found.dtype}" if isinstance(found, np.ndarray) else "several arrays"
        raise QCompilerError(f"--labels {path} holds {held}; it takes one integer for each of {count} samples.")
    return found.reshape(-1).astype(np.int64)
