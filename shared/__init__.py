"""What both stages speak: image sources, views, the codebook, the token store, console and files."""
