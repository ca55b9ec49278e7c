"""Sources of images: tars and folders, their images' keys, and where the bytes of each image are."""
