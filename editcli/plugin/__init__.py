"""The seam: what a plugin gives us, and what we give it."""
