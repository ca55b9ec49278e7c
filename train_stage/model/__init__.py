"""The Vision Transformer with two streams, and its attention."""
