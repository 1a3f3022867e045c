"""The health of edited matrices, read from files."""
