"""The scripted server, which bilm-bench is run against."""

from tests.support.scripted import answering, scripted

__all__ = ["answering", "scripted"]
