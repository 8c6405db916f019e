"""How the report draws: matplotlib without a screen, and figures as SVG text inside the page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

plt.rcParams.update(
    {
        "svg.hashsalt": "nemo_pivotrl",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "text.parse_math": False,  # names come from recipes and data: a `$` in one is a dollar
    }
)


def svg(figure: Figure) -> str:
    """The figure as one `<svg>` element; closes it."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    return out.getvalue()[out.getvalue().index("<svg") :]


def curve(axes: Axes, rows: Sequence[dict[str, Any]], key: str, **style: Any) -> None:
    """A metric over steps, of the rows that have it."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    if points:
        axes.plot(*zip(*points, strict=True), linewidth=1.2, **style)
