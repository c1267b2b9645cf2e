"""Data sets, tables and whatever else `fit` takes, as tensors."""
