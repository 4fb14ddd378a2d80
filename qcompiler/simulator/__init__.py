"""The NPU simulator: command programs, their costs, their execution and their traces."""
