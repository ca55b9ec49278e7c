"""What a fine-tuned classifier achieves: which outputs count, accuracy and calibration, ReaL labels, the page."""
