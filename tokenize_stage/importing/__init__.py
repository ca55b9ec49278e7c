"""Imports centroids and tokens that were computed elsewhere."""
