"""Stores and codebooks as pages to look at."""
