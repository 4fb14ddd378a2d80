"""Graph passes, one rewrite a file. Importing this package imports none of them.

Passes on the float or QDQ graph run in this order, which `qcompiler.pipeline` spells out. Each runs once and settles
by itself; a pass listed twice is listed with the reason.

Simplify, for every target:

 1. `fold_constants.FoldConstants`
 2. `remove_identity.RemoveIdentity`
 3. `fold_auto_pad.FoldAutoPad`              explicit pads, before anything reads pads
 4. `normalize_gather.NormalizeGather`
 5. `normalize_reshape.NormalizeReshape`
 6. `fuse_activation.FuseActivation`         before arithmetic is rewritten: it knows x / 6 and x ^ 3
 7. `normalize_pool.NormalizePool`
 8. `normalize_conv1d.NormalizeConv1d`       behind the pools, which may be 1-D too
 9. `fold_pad.FoldPad`
10. `normalize_matmul.NormalizeMatMul`       before affine folding, which folds into Gemm
11. `fold_batch_norm.FoldBatchNorm`
12. `normalize_arithmetic.NormalizeArithmetic`
13. `fold_affine.FoldAffine`
14. `cancel_transposes.CancelTransposes`
15. `merge_movement.MergeMovement`
16. `normalize_reshape.NormalizeReshape`     again: conv1d, matmul and pools made Reshapes
17. `remove_identity.RemoveIdentity`         again: merged Reshapes and Transposes may do nothing

Legalize, each constructed with the `Target` it asks:

 1. `lower_conv_transpose.LowerConvTranspose(target)`   makes convolutions
 2. `split_grouped_conv.SplitGroupedConv(target)`
 3. `expand_dilation.ExpandDilation(target)`
 4. `split_large_pool.SplitLargePool(target)`
 5. `expand_hard_sigmoid.ExpandHardSigmoid(target)`
"""
