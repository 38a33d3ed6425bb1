"""`bilm-serve` with a model that never finishes loading."""

import sys
import threading

import bilm_server.main
from bilm_server.config import ServerConfig
from bilm_server.served_model import ServedModel


def load_for_ever(config: ServerConfig) -> ServedModel:
    """Return never."""
    threading.Event().wait()
    raise AssertionError("nobody sets the event")


def main(argv: list[str] | None = None) -> int:
    """Run `bilm-serve`."""
    return bilm_server.main.main(argv, load_for_ever)


if __name__ == "__main__":
    sys.exit(main())
