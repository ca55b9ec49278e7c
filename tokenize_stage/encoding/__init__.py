"""From images to the rows of a token store."""
