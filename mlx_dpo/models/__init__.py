"""The MLX side: loading, adapters, scoring, memory."""
