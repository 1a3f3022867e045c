"""Benchmarks: one command each, ratios within one run, results as JSON beside a printed table."""
