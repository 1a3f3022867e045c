"""Several processes as one run: how they are joined, and which of them does which share of the work."""
