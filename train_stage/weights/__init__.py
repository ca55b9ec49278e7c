"""Weights on disk: checkpoints, published files, imports and exports."""
