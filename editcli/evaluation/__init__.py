"""Measure what edits did, every number under the name of its protocol."""
