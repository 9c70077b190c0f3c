"""The whole loop in one command, on a small real model."""
