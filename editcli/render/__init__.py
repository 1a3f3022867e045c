"""Tables and progress for a terminal: the only room that imports rich."""
