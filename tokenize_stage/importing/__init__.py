"""Centroids and tokens that were computed elsewhere."""
