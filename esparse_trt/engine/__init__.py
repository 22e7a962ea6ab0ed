"""TensorRT: both flavours behind one module, engine building and running."""
