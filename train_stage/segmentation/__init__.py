"""Semantic segmentation with pre-trained weights: masks, patches, classifiers of patches, mean IoU."""
