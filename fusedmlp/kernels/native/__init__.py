"""The compiled extension: C++ for CPU tensors, CUDA for CUDA tensors, from csrc/.

It registers its kernels with torch.ops.fusedmlp.*.native itself, so there are no functions here.
"""
