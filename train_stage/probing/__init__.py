"""Probing: classifiers on frozen features, with every choice made on training images, and probes of running runs."""
