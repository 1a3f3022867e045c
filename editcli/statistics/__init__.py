"""Second moments E[k k^T] of keys on reference text."""
