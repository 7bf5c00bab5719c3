"""Sparsity that depends on the input: which neurons, heads and labels a token needs."""
