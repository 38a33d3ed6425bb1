"""Training of biLMs: `bilm-train`."""
