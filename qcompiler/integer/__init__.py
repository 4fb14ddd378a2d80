"""The integer graph: operators of the `qcompiler` ONNX domain, their contract and numpy reference."""
