"""What runs the training steps: PyTorch's autograd, the native extension, a CUDA graph."""
