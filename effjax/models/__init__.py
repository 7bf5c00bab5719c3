"""Flax models that the experiments need, small and readable, and importers of real checkpoints."""
