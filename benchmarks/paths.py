"""Where the project, its results and the texts for benchmarks are."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
WIKITEXT = ROOT.parent / "shared" / "data" / "wikitext-2"
