"""Serving: the Triton Inference Server model repository."""
