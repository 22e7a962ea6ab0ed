"""PyTorch: scores, permutations and masks; nothing here knows ONNX."""
