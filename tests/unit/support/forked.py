"""What the forks of test_servers run: says where it is and how it was started, and ends as it is told."""

import os
import resource
import signal
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Print the surroundings, then return the code that is the first argument; "wait": wait for a signal."""
    print(os.environ["BILM_TEST_WORD"], Path.cwd(), resource.getrlimit(resource.RLIMIT_NOFILE)[0], flush=True)
    print("an error", file=sys.stderr, flush=True)
    if arguments == ["wait"]:
        signal.pause()
    return int(arguments[0])
