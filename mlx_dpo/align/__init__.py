"""Objectives, the reference, the trainer, its checkpoints and its report."""
