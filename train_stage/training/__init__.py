"""What a training step does, on one process or many."""
