"""How healthy edited matrices are, read from files."""
