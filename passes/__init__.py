"""Graph passes, one rewrite a file. Importing this package imports none of them.

A pass runs until it finds no more to do, so none needs a second run for its own sake. `qcompiler.pipeline` holds the
order. What the order must respect, for the passes on the float or QDQ graph:

- `FoldConstants` first: the others ask for constants.
- `FoldAutoPad` before whatever reads pads: `FoldPad`, `NormalizeConv1d`, `NormalizePool`, `FoldAffine`.
- `FoldPad` before `NormalizeConv1d`: a Pad folds only where it stands right before its convolution.
- `FuseActivation` before `FoldAffine`, which would take the 3 of clip(x + 3, 0, 6) / 6 for a bias.
- `NormalizeMatMul` before `FoldBatchNorm` and `FoldAffine`, which know one form of Gemm.
- `NormalizeGather` before `MergeMovement`, which follows Slices.
- `NormalizeReshape`, then `RemoveIdentity`, behind everything that makes Reshapes: `NormalizeConv1d`, `NormalizePool`,
  `NormalizeMatMul`, `MergeMovement`.

Among the passes that ask the target: `LowerConvTranspose`, which makes convolutions, then `ExpandDilation`, then
`SplitGroupedConv`; the first two count on the last. `UnfoldPoolPad` takes apart what `FoldPad` joined, where the target
cannot count padding.
"""
