"""How long OpenMP's threads spin: bounded, unless the user has said how they wait."""

import subprocess
import sys

import pytest
from bilm_system.openmp import bound_spinning

TIME_LIMIT_S = 120

PROGRAM = """
import os, sys
from bilm_server.main import load_model
assert "torch" not in sys.modules, "torch comes first: it would bring libgomp with its own spinning"
assert "GOMP_SPINCOUNT" not in os.environ
try:
    load_model(None)
except AttributeError:  # there is no configuration
    pass
print(os.environ["GOMP_SPINCOUNT"])
"""


def test_spinning_is_bounded() -> None:
    environment = {"HOME": "/"}
    bound_spinning(environment)
    assert 0 < int(environment.pop("GOMP_SPINCOUNT")) < 300_000
    assert environment == {"HOME": "/"}


@pytest.mark.parametrize("said", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_what_the_user_says_wins(said: dict[str, str]) -> None:
    environment = dict(said)
    bound_spinning(environment)
    assert environment == said


def test_the_server_bounds_it_before_torch_is_imported() -> None:
    ran = subprocess.run(
        ["env", "-u", "OMP_WAIT_POLICY", "-u", "GOMP_SPINCOUNT", sys.executable, "-c", PROGRAM],
        capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 0
