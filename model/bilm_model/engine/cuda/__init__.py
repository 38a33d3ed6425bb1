"""The engine's CUDA back end."""
