"""The search of layers and settings: its space, its objective, its trials."""
