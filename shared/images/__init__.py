"""Images: how they are decoded, and the views that are cropped from them."""
