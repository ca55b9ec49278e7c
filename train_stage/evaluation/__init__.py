"""What weights are worth: frozen features and what is measured on them."""
