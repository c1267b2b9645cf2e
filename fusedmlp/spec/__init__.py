"""What every backend implements: activations, the mask, layers, dtypes, checks."""
