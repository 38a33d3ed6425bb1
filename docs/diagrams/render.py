"""Renders the diagrams: `python docs/diagrams/render.py`, with PlantUML and Graphviz (Debian: plantuml, graphviz).

PlantUML's comments (its version, the machine's Java) are left out. Instead each SVG holds the hash of what it was made
of: tests/unit/server/test_docs.py fails where a source was changed and not rendered again.
"""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
_PLANTUML = ("plantuml", "-tsvg", "-pipe", "-nometadata", "-charset", "UTF-8")


def source_hash(source: Path) -> str:
    """Of a diagram and the style that it includes."""
    texts = [path.read_text(encoding="utf-8") for path in (FOLDER / "style.iuml", source)]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def render(source: Path) -> None:
    """Writes the SVG beside its source.

    Raises:
        subprocess.CalledProcessError: if PlantUML can't make sense of it; it has said why.
    """
    done = subprocess.run(_PLANTUML, input=source.read_bytes(), cwd=FOLDER, stdout=subprocess.PIPE, check=True)  # noqa: S603 - constants
    svg = done.stdout.decode()
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    # White paper: viewers differ in whether they heed a background among the styles of the root
    paper = '<rect width="100%" height="100%" fill="#FFFFFF"/>'
    start = re.search("<svg[^>]*>", svg)
    assert start is not None  # noqa: S101 - that is what -tsvg is for
    lines = [svg[: start.end()], f"<!-- source: {source_hash(source)} -->", paper, svg[start.end() :]]
    source.with_suffix(".svg").write_text("".join(lines).replace("><", ">\n<") + "\n", encoding="utf-8")


def main() -> int:
    """Renders all of them."""
    for source in sorted(FOLDER.glob("*.puml")):
        render(source)
        print(source.with_suffix(".svg").name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
