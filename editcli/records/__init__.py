"""The contents of a run folder, and reading them back."""
