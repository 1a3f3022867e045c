"""What a run folder holds, and reading it back."""
