"""Frozen image towers: any open_clip or timm model as a function from pixels to patch features."""
