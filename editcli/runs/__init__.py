"""Runs: a stream of batches from its plan to its files, and what is done with a run afterwards."""
