"""What a command does when it is not a run itself: one module each."""
