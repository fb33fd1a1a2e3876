"""Images from strangers: the headers of each format are checked, then pixels are decoded to RGB."""
