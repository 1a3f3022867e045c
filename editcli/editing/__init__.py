"""Editing: target values, keys and residuals, and the loop that every batch goes through."""
