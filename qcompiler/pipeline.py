"""The passes of each graph stage, in order, and the loop that runs them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import onnx_ir as ir

from qcompiler.errors import QCompilerError
from qcompiler.passes.cancel_layout_transposes import CancelLayoutTransposes
from qcompiler.passes.cancel_transposes import CancelTransposes
from qcompiler.passes.center_weights import CenterWeights
from qcompiler.passes.crop_kernel import CropKernel
from qcompiler.passes.expand_dilation import ExpandDilation
from qcompiler.passes.expand_hard_sigmoid import ExpandHardSigmoid
from qcompiler.passes.fold_affine import FoldAffine
from qcompiler.passes.fold_auto_pad import FoldAutoPad
from qcompiler.passes.fold_batch_norm import FoldBatchNorm
from qcompiler.passes.fold_constants import FoldConstants
from qcompiler.passes.fold_integer_constants import FoldIntegerConstants
from qcompiler.passes.fold_pad import FoldPad
from qcompiler.passes.fuse_activation import FuseActivation
from qcompiler.passes.fuse_requantize import FuseRequantize
from qcompiler.passes.legalize_signedness import LegalizeSignedness
from qcompiler.passes.lower_conv_transpose import LowerConvTranspose
from qcompiler.passes.merge_movement import MergeMovement
from qcompiler.passes.normalize_arithmetic import NormalizeArithmetic
from qcompiler.passes.normalize_conv1d import NormalizeConv1d
from qcompiler.passes.normalize_gather import NormalizeGather
from qcompiler.passes.normalize_matmul import NormalizeMatMul
from qcompiler.passes.normalize_pool import NormalizePool
from qcompiler.passes.normalize_recurrent import NormalizeRecurrent
from qcompiler.passes.normalize_reshape import NormalizeReshape
from qcompiler.passes.project_recurrent import ProjectRecurrent
from qcompiler.passes.propagate_qdq import PropagateQdq
from qcompiler.passes.remove_identity import RemoveIdentity
from qcompiler.passes.share_scales import ShareScales
from qcompiler.passes.split_grouped_conv import SplitGroupedConv
from qcompiler.passes.split_large_pool import SplitLargePool
from qcompiler.passes.unfold_pool_pad import UnfoldPoolPad
from qcompiler.target import Target
from qcompiler.verify import VerificationError, verify, verify_shapes

Passes = tuple[ir.passes.InPlacePass, ...]

SIMPLIFY: Passes = (
    # The importer has rewritten QLinear and com.microsoft operators: it needs that to infer shapes.
    FoldConstants(),
    # Gather becomes Slice first, so that whole chains of data movement merge.
    NormalizeGather(),
    MergeMovement(),
    # One spelling for each operation; then the Reshapes these leave merge, and what does nothing goes.
    FoldAutoPad(),
    FoldPad(),
    CropKernel(),
    # What they leave are products and data movement, which the passes behind take on.
    NormalizeRecurrent(),
    ProjectRecurrent(),
    NormalizeConv1d(),
    NormalizePool(),
    NormalizeMatMul(),
    NormalizeArithmetic(),
    NormalizeReshape(),
    RemoveIdentity(),
    # Fewer operators. Activations go before FoldAffine, which would take the + 3 of a hard sigmoid for a bias.
    FoldBatchNorm(),
    FuseActivation(),
    FoldAffine(),
    # Less data movement.
    CancelTransposes(),
)
"""Target-independent, on float and QDQ models alike."""


def legalize(target: Target) -> Passes:
    """Decompose what the target refuses into what it takes; still float or QDQ."""
    return (
        LowerConvTranspose(target),
        ExpandDilation(target),
        SplitGroupedConv(target),
        SplitLargePool(target),
        ExpandHardSigmoid(target),
        UnfoldPoolPad(target),
    )


def harmonize(target: Target) -> Passes:
    """Give a QDQ model the scales, signedness and Q/DQ positions the target's operators want."""
    return (
        # Signedness before scales: tensors that then differ in zero point only by their type share one already.
        PropagateQdq(),
        LegalizeSignedness(target),
        CenterWeights(target),
        ShareScales(target),
    )


LAYOUT: Passes = (
    # Transposes of constants fold once they have reached them; what then stands side by side merges.
    CancelLayoutTransposes(),
    FoldIntegerConstants(),
    FuseRequantize(),
)
"""On the integer graph: cancel the transposes between NHWC operators and what was NCHW, and merge what can be."""


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
