"""How every figure of midflight looks, and how it is saved."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, MUTED, RULE = "#1f2933", "#667080", "#c9ced6"
WORSE = "#d55e00"  # of the palette of Okabe and Ito, made to be told apart by everyone

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
    """A context in which every figure of midflight is drawn, whatever the user's settings."""
    settings: Any = _DEFAULTS | _STYLE
    return matplotlib.rc_context(settings)


def save(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write NAME.svg and NAME.png (160 dpi) of each figure; a file is there whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        for suffix, content in (("svg", as_svg(figure).encode()), ("png", as_png(figure))):
            path = folder / f"{name}.{suffix}"
            replace_file(path, content)
            paths.append(path)
    return paths


def as_svg(figure: Figure) -> str:
    """The figure as SVG whose text is text; equal figures give equal texts."""
    return _render(figure, "svg", metadata={"Date": None, "Creator": None}).decode()


def as_png(figure: Figure) -> bytes:
    """The figure as PNG, 160 dpi."""
    return _render(figure, "png", dpi=160, metadata={"Software": None})


def replace_file(path: Path, content: bytes) -> None:
    """Write `path` whole: who reads it meanwhile sees the old content."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


_DEFAULTS: dict[str, Any] = {
    k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith(("backend", "webagg"))
}


def _render(figure: Figure, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with style():
        if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # it would move things a little at each drawing
        figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()
