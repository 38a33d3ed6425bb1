"""`bilm-serve` with shorter waits for connections that nobody uses."""

import json
import os
import sys

import bilm_server.main
from bilm_server.protocols.grpc import connections

WAITS = "BILM_TEST_WAITS_MS"
"""The variable with the constants of bilm_server.protocols.grpc.connections to replace, as a JSON object."""


def main(argv: list[str] | None = None) -> int:
    """Run `bilm-serve`."""
    waits_ms = json.loads(os.environ[WAITS])
    assert waits_ms.keys() <= vars(connections).keys()
    vars(connections).update(waits_ms)
    return bilm_server.main.main(argv)


if __name__ == "__main__":
    sys.exit(main())
