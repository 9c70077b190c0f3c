"""Preference pairs: reading, templates, batches."""
