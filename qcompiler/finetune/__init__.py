"""Quantization-aware training of an ONNX model: `qcompile finetune`. Needs PyTorch, the extra `finetune`.

`four_bits` and `sharing` decide formats, `operators` computes in torch, `fake_quant` rounds with learned scales,
`network` puts both together, `training` distils, `finetune` is the road from file to file.
"""
