"""Edit requests: what one is, and reading, converting and comparing them."""
