"""Stage two: images and their stored tokens -> a pre-trained ViT. Never imports `tokenize_stage`."""
