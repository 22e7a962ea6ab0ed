"""esparse-trt: prune a language model to N:M sparsity (E-Sparse), export it to ONNX and TensorRT, prove it."""
