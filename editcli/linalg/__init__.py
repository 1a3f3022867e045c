"""Norms, spectra and randomized estimates of single matrices."""
