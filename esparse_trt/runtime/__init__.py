"""Sparse models in PyTorch: the same kernels as the TensorRT plugin, under a Hugging Face model."""

from esparse_trt.runtime.decode import Decoder, generate
from esparse_trt.runtime.linear import SparseLinear
from esparse_trt.runtime.load import load

__all__ = ["Decoder", "SparseLinear", "generate", "load"]
