"""Editing: target values, keys and residuals, the least-squares problem, and the loop around them."""
