"""Quantization: number formats, the exact integer arithmetic, ranges, plans."""
