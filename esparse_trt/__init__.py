"""esparse-trt: N:M sparse language models with E-Sparse, from PyTorch to ONNX, TensorRT and Triton."""
