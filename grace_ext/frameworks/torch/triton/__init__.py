"""Triton kernels for torch tensors on a GPU, and the array protocol with them. Importing this package does not import Triton."""
