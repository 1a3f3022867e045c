"""Presets: which layers to edit and with which settings."""
