"""Where the project, its results and the texts for benchmarks are."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CORPORA = Path(os.environ.get("BILM_TEST_DATA", ROOT.parent / "shared" / "data"))
WIKITEXT = CORPORA / "wikitext-2"
