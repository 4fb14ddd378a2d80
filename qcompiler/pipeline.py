"""The passes of each graph stage, in order, and the loop that runs them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import onnx_ir as ir

from qcompiler.errors import QCompilerError
from qcompiler.verify import VerificationError, verify, verify_shapes


@dataclass
class Dumper:
    """Writes the model after each stage as a numbered ONNX file: 01-import.onnx, 02-simplify.onnx…"""

    folder: Path
    written: list[Path] = field(default_factory=list)

    def dump(self, model: ir.Model, stage: str) -> Path:
        """Write one file and return its path. Raises QCompilerError if the folder cannot be written."""
        path = self.folder / f"{len(self.written) + 1:02d}-{stage}.onnx"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            ir.save(model, path)
        except OSError as error:
            raise QCompilerError(
                f"the dump {path} cannot be written ({error.strerror}); choose another --dump folder"
            ) from None
        self.written.append(path)
        return path


def run_passes(
    model: ir.Model, passes: Sequence[ir.passes.InPlacePass], *, stage: str, dumper: Dumper | None = None
) -> ir.Model:
    """Run each pass once, in order, verifying the model after each; then dump it.

    Raises:
        QCompilerError: what a pass refuses of the user's model.
        VerificationError: a pass broke the model; the message names pass and stage.
        Other errors of a pass carry a note naming pass and stage.
    """
    for index, rewrite in enumerate(passes):
        label = f"{type(rewrite).__name__} (pass {index + 1} of {len(passes)} in {stage})"
        with _Blame(label):
            modified = rewrite(model).modified
        if modified:
            verify(model, label)
    verify_shapes(model, stage)
    if dumper is not None:
        dumper.dump(model, stage)
    return model


@dataclass(frozen=True)
class _Blame:
    """Adds the pass's name to an error on its way out."""

    label: str

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, QCompilerError | VerificationError):
            error.add_note(f"in {self.label}")
