"""The model that ships; its card stands beside it."""

from pathlib import Path

DEFAULT = Path(__file__).with_name("wikitext2-mini.safetensors")
"""The default model."""
