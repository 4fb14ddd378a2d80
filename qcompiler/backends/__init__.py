"""Lowering of integer graphs to TVM modules."""
