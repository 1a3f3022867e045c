"""Checkpoints that store matrices in few bits: how each format is read, and written as it was."""
