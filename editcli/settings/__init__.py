"""Settings: everything that decides what a command does."""
