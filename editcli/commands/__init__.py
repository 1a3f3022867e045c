"""The work of the commands that are no runs themselves: one module each."""
