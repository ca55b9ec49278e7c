"""Pages to look at: one HTML file each, that needs nothing else. Both stages render theirs here."""
