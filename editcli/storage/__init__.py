"""Files on disk: written whole or not at all, read in bounded memory, checkpoints tensor by tensor."""
