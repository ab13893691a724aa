"""Perplexity, KL divergence and task accuracy of models, with paired comparisons."""
