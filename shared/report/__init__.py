"""HTML pages of both stages, each of them one file without external resources."""
