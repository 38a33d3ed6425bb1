"""Numbers for people to read."""


def short(value: float | None) -> str:
    """Return three digits, or all that stand before the point; – for what wasn't measured."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
