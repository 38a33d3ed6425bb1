"""The engine's CPU back end."""
