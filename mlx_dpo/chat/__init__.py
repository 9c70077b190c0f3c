"""A conversation with a local model."""
