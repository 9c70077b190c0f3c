"""Weights in and out, and the proof that nothing was lost on the way."""
