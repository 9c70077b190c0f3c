"""What is wrong with preference pairs, found before a model learns it."""
