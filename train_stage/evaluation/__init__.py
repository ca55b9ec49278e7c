"""Evaluations: what pre-trained weights achieve on labelled images, and what runs predict for held-out ones."""
