"""The commands of `esparse-trt`, a module for each group; `cli.py` puts them together."""
