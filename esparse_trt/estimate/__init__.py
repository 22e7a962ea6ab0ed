"""`esparse-trt estimate`: whether sparsity will pay, from the model's configuration alone, before any work.

`layout` finds the model's GEMMs and which of them can run sparse; `times` says how long each takes on a
GPU, `gpus` what that GPU can do; `engine.choice` picks sparse or dense for each under the recipe's traffic;
`steps` adds up what a pass through the model takes; `predict` puts it together, `show` prints it.
"""
