"""The figures of a token store or a codebook, and what is suspicious about them."""
