"""A run's folder: what is in it, how it begins and how it resumes."""
