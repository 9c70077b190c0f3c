"""Preference pairs from questions, written by a local model in two voices."""
