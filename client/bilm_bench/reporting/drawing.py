"""What all plots share: style, colours and the way to SVG.

Colours are the page's: they change with its light or dark scheme.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

# What matplotlib draws with, and the page's variable for it
COLOURS = {
    "ink": "#010203",
    "grid": "#020304",
    "blue": "#030405",
    "orange": "#040506",
    "red": "#050607",
    "grey": "#060708",
    "pale": "#070809",
}
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "bilm-bench",  # the same report gives the same page
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), COLOURS["ink"]),
    "grid.color": COLOURS["grid"],
}


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in the page's style while the context lasts."""
    with mpl.rc_context(_STYLE):
        yield


def new_figure(panels: int = 1, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels side by side; `height` in inches."""
    figure = Figure(figsize=(8.4, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def make_logarithmic(axes: Axes) -> None:
    """Give the vertical axis a logarithmic scale with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def to_svg(figure: Figure) -> str:
    """Return the figure with the page's colours."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = file.getvalue()[file.getvalue().index("<svg") :]
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text
