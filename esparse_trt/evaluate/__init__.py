"""What pruning cost: comparison, perplexity, report."""
