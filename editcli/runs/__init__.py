"""Runs: a stream of batches from its plan to its files."""
