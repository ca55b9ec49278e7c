"""Files: written atomically, with digests, and at URLs."""
