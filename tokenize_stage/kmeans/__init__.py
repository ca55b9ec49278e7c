"""k-means over a uniform sample of patch features."""
