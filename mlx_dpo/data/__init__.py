"""Examples to learn from: reading, templates, batches."""
