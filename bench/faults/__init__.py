"""Faults injected into training, writing and reading, and what became of them: python -m
bench.faults."""
