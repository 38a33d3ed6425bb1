"""The service: a biLM behind gRPC."""

from importlib.metadata import version

__version__ = version("bilm-serve")
