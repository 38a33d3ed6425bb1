"""The service: a biLM behind gRPC."""

import os
from importlib.metadata import version

# Before grpc is loaded: its core writes a line to standard error for each bad frame and failed handshake of anybody's
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

__version__ = version("bilm-serve")
