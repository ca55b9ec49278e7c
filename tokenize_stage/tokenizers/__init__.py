"""Visual tokenizers: pixels of a view -> a grid of token indices."""
