"""The statistics of a token store or a codebook, and warnings about them."""
