"""What runs over token vectors, each in its context."""
