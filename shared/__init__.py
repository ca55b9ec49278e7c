"""What both stages use: image sources, views, the codebook, the token store, files, processes and the terminal."""
