"""Style and save figures."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from midflight._reporting.files import replacing

INK, MUTED, RULE = "#1f2933", "#667080", "#c9ced6"
WORSE = "#d55e00"  # from Okabe and Ito's palette, which is safe for colour-blind readers
BOX = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6}
"""Box behind words that are written over lines."""

_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "figure.facecolor": "white",
    "figure.titlesize": 12.5,
    "figure.titleweight": "bold",
    "lines.solid_capstyle": "round",
    "axes.unicode_minus": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "midflight",
}


def style() -> Any:
    """Return a context manager that sets midflight's style and ignores the user's settings."""
    settings: Any = _DEFAULTS | _STYLE
    return matplotlib.rc_context(settings)


def panels(
    title: str, size: tuple[float, float], rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """Return a figure with a heading, and its panels as an array of shape (rows, columns)."""
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    figure.suptitle(title, x=0.01, ha="left")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write NAME.svg and NAME.png (160 dpi) of each figure; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        for suffix, content in (("svg", as_svg(figure).encode()), ("png", as_png(figure))):
            path = folder / f"{name}.{suffix}"
            with replacing(path) as part:
                part.write_bytes(content)
            paths.append(path)
    return paths


def as_svg(figure: Figure) -> str:
    """Return the figure as SVG with selectable text; equal figures give equal files."""
    return _render(figure, "svg", dpi=160, metadata={"Date": None, "Creator": None}).decode()


def as_png(figure: Figure) -> bytes:
    """Return the figure as PNG, 160 dpi."""
    return _render(figure, "png", dpi=160, metadata={"Software": None})


def note(axis: Axes, words: str) -> None:
    """Write words into the middle of a panel."""
    axis.text(
        0.5, 0.5, words, transform=axis.transAxes, ha="center", va="center", color=MUTED, zorder=9,
        in_layout=False,  # the text lies inside the panel
        bbox=BOX,
    )  # fmt: skip


_DEFAULTS: dict[str, Any] = {
    k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith(("backend", "webagg"))
}


def _render(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with style():
        if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # a second layout pass would shift the axes
        figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()
