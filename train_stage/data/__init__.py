"""Images joined with their tokens, and the batches that are made of them."""
