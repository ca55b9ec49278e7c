"""What is counted in one pass over a token store, and the arithmetic of its statistics."""
