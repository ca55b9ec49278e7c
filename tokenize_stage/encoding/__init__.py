"""Images in, rows of the token store out."""
