"""Visual tokenizers: they turn the pixels of a view into a grid of token indices."""
