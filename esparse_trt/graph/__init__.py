"""ONNX: export, folding of permutations, certificates."""
