"""Models: where their parts are, how they are read, and their forward pass from one layer to another."""
