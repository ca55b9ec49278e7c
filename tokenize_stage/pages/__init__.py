"""HTML pages that show a token store or a codebook."""
