"""Files that appear whole or not at all, and files behind URLs."""
