"""The fast path: the same numbers as the reference network, in another order of work."""
