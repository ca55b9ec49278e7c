"""Classification: labelled images, their augmentation, layer-wise learning rates, and what a classifier achieves."""
