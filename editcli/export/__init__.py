"""Results that travel: an adapter, a patch or a plain folder made from a finished run, and a patch applied again."""
