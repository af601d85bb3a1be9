"""Draws the pictures of docs/blocks.md, beside itself: `python docs/pictures/blocks_pictures.py`.

One function a picture. A drawing goes from the bottom, where the hidden states of a layer come in, to the top.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Circle, FancyBboxPatch

GREY, BLUE, ORANGE, GREEN, LIGHT = "#555555", "#0072b2", "#e69f00", "#009e73", "#f2f2f2"
FILLED = {"n": "#fbe3b0", "f": "#cfe5f3", "kept": ORANGE, "plain": LIGHT}


def canvas(count: int, width: float, height: float, scale: float = 0.62) -> tuple[Any, list[Any]]:
    """Drawings side by side, each `width` by `height` units."""
    figure, axes = plt.subplots(1, count, figsize=(count * width * scale, height * scale), layout="constrained")
    drawings = list(np.atleast_1d(axes))
    for each in drawings:
        each.set(xlim=(0, width), ylim=(0, height), aspect="equal")
        each.axis("off")
    return figure, drawings


def box(axes: Any, x: float, y: float, text: str, kind: str = "plain", width: float = 1.1, height: float = 0.7) -> None:
    """A box around its middle."""
    corner = x - width / 2, y - height / 2
    style = {"boxstyle": "round,pad=0,rounding_size=0.12", "fc": FILLED[kind], "ec": GREY, "lw": 1}
    axes.add_patch(FancyBboxPatch(corner, width, height, **style))
    axes.text(x, y, text, ha="center", va="center", fontsize=11)


def plus(axes: Any, x: float, y: float) -> None:
    axes.add_patch(Circle((x, y), 0.22, fc="white", ec=GREY, lw=1))
    axes.text(x, y, "+", ha="center", va="center", fontsize=12)


def arrow(axes: Any, *points: tuple[float, float], color: str = GREY) -> None:
    """A line through the points, with a head at the last."""
    xs, ys = zip(*points, strict=True)
    axes.plot(xs[:-1], ys[:-1], color=color, lw=1.2, solid_capstyle="round")
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=style)


def label(axes: Any, x: float, y: float, text: str, **style: Any) -> None:
    axes.text(x, y, text, ha=style.pop("ha", "center"), va="center", **{"fontsize": 10, "color": GREY} | style)


def dot(axes: Any, x: float, y: float) -> None:
    axes.add_patch(Circle((x, y), 0.13, fc=ORANGE, ec=GREY, lw=0.8))


def placements() -> Any:
    """post, pre, residual: one branch each."""
    figure, (post, pre, residual) = canvas(3, 5, 7)
    for axes, title in ((post, "post"), (pre, "pre"), (residual, "residual")):
        label(axes, 2, 6.7, title, fontsize=13, color="black")
        label(axes, 1.2, 0.3, "x", fontsize=12)
        label(axes, 1.2, 5.6, "x", fontsize=12)
        arrow(axes, (1.2, 1.0), (2.8, 1.0), (2.8, 1.35 if axes is pre else 1.95))
    for axes in (post, residual):
        box(axes, 2.8, 2.3, "f", "f")
        arrow(axes, (1.2, 0.6), (1.2, 3.18))
        arrow(axes, (2.8, 2.65), (2.8, 3.4), (1.42, 3.4))
        plus(axes, 1.2, 3.4)
        arrow(axes, (1.2, 3.62), (1.2, 4.05))
        box(axes, 1.2, 4.4, "n", "n")
        arrow(axes, (1.2, 4.75), (1.2, 5.3))
    arrow(pre, (1.2, 0.6), (1.2, 4.18))
    box(pre, 2.8, 1.7, "n", "n")
    arrow(pre, (2.8, 2.05), (2.8, 2.55))
    box(pre, 2.8, 2.9, "f", "f")
    arrow(pre, (2.8, 3.25), (2.8, 4.4), (1.42, 4.4))
    plus(pre, 1.2, 4.4)
    arrow(pre, (1.2, 4.62), (1.2, 5.3))
    label(pre, 2, 6.15, "after the last layer: n(x)")
    label(residual, 4.3, 0.3, "d", fontsize=12)
    arrow(residual, (4.3, 0.6), (4.3, 3.18))
    arrow(residual, (2.8, 3.4), (4.08, 3.4))
    plus(residual, 4.3, 3.4)
    arrow(residual, (4.3, 3.62), (4.3, 5.3))
    label(residual, 4.3, 5.6, "d", fontsize=12)
    label(residual, 2.6, 6.15, "after the last layer: x + n(d)")
    return figure


def norms() -> Any:
    """One token: its numbers, by LayerNorm, by RMSNorm."""
    x = np.array([2.6, 1.4, 3.1, 0.4, 1.9, -0.9, 2.2, 1.1])
    shown = {
        "a token": x,
        "layer: (x - mean) / deviation": (x - x.mean()) / x.std(),
        "rms: x / root of the mean square": x / np.sqrt(np.square(x).mean()),
    }
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.4), layout="constrained", sharey=True)
    for each, (title, values), color in zip(axes, shown.items(), (GREY, ORANGE, BLUE), strict=True):
        each.bar(range(len(x)), values, color=color)
        each.axhline(0, color="black", lw=0.8)
        each.axhline(values.mean(), color="black", lw=0.8, ls=":")
        each.set_title(title, fontsize=10)
        each.set(xticks=[])
    return figure


def streams() -> Any:
    """What stays in memory between forward and backward; a dot is a tensor of the hidden states' size."""
    figure, drawings = canvas(3, 5, 7.4)
    for axes, title in zip(drawings, ("plain", "checkpoint", "reversible"), strict=True):
        label(axes, 2.5, 7.1, title, fontsize=13, color="black")
        for layer in range(4):
            y = 1.2 + 1.4 * layer
            box(axes, 2.5, y, "", width=3.4, height=0.9)
            label(axes, 1.15, y, f"{layer + 1}")
            arrow(axes, (2.5, y - 0.95), (2.5, y - 0.45))
            if title == "plain":
                for x in (1.7, 2.2, 2.7, 3.2, 3.7):
                    dot(axes, x, y)
            elif title == "checkpoint":
                dot(axes, 2.5, y - 0.75)
                label(axes, 2.7, y, "again")
            else:
                label(axes, 2.7, y, "back, and again")
        arrow(axes, (2.5, 5.85), (2.5, 6.35))
        if title == "reversible":
            dot(axes, 2.35, 6.5)
            dot(axes, 2.65, 6.5)
    return figure


def feed_forwards() -> Any:
    """dense, gated, in chunks, moe."""
    figure, (dense, gated, chunks, moe) = canvas(4, 5, 6)
    titles = ("dense", "gated=True", "chunk_size", "moe, top_k=2")
    for axes, title in zip((dense, gated, chunks, moe), titles, strict=True):
        label(axes, 2.5, 5.7, title, fontsize=13, color="black")
        if axes is not chunks:
            arrow(axes, (2.5, 0.1), (2.5, 0.65))
        if axes in (dense, gated):
            arrow(axes, (2.5, 4.6), (2.5, 5.3))
    box(dense, 2.5, 1.0, "D → 4 D", "f", 2.2)
    box(dense, 2.5, 2.6, "gelu", width=2.2)
    box(dense, 2.5, 4.25, "4 D → D", "f", 2.2)
    arrow(dense, (2.5, 1.35), (2.5, 2.25))
    arrow(dense, (2.5, 2.95), (2.5, 3.9))
    box(gated, 2.5, 1.0, "D → 2 × 4 D", "f", 3.2)
    box(gated, 1.5, 2.3, "gelu")
    arrow(gated, (1.5, 1.35), (1.5, 1.95))
    arrow(gated, (1.5, 2.65), (1.5, 3.2), (2.28, 3.2))
    arrow(gated, (3.5, 1.35), (3.5, 3.2), (2.72, 3.2))
    gated.add_patch(Circle((2.5, 3.2), 0.22, fc="white", ec=GREY))
    label(gated, 2.5, 3.2, "×", fontsize=12)
    arrow(gated, (2.5, 3.42), (2.5, 3.9))
    box(gated, 2.5, 4.25, "4 D → D", "f", 2.2)
    for part in range(3):
        x = 1.1 + 1.4 * part
        box(chunks, x, 2.65, "dense", "f" if part == 1 else "plain", 1.2, 1.6)
        arrow(chunks, (2.5, 0.1), (2.5, 1.2), (x, 1.2), (x, 1.85))
        arrow(chunks, (x, 3.45), (x, 4.1), (2.5, 4.1), (2.5, 5.3))
    box(moe, 2.5, 1.0, "router", "n", 1.6)
    for expert, taken in enumerate((False, True, False, True)):
        x = 0.7 + 1.2 * expert
        box(moe, x, 2.9, f"{expert + 1}", "f" if taken else "plain", 0.95, 1.3)
        if taken:
            arrow(moe, (2.5, 1.35), (2.5, 1.8), (x, 1.8), (x, 2.25))
            arrow(moe, (x, 3.55), (x, 4.1), (2.5, 4.1), (2.5, 5.3))
    return figure


def initial() -> Any:
    """The deviation of the residual sum after so many branches of a new model, pre, 24 layers."""
    branches = np.arange(49)
    figure, axes = plt.subplots(figsize=(5.2, 2.8), layout="constrained")
    axes.plot(branches, np.sqrt(1 + branches), color=ORANGE, label="bert: each branch adds 1")
    axes.plot(branches, np.sqrt(1 + branches / 48), color=BLUE, label="deep: all 48 branches together add 1")
    axes.set(xlabel="branches passed", ylabel="deviation of the sum", ylim=(0, None))
    axes.legend(fontsize=9)
    return figure


def sharing() -> Any:
    """Layers of their own, and one for all passes."""
    figure, (own, shared) = canvas(2, 4, 5.2)
    for axes, title in ((own, "layers of their own"), (shared, "share_layers=True")):
        label(axes, 2, 4.95, title, fontsize=12, color="black")
    for layer in range(3):
        y = 1.1 + 1.3 * layer
        arrow(own, (2, y - 0.9), (2, y - 0.35))
        box(own, 2, y, f"layer {layer + 1}", "f", 1.8)
    arrow(own, (2, 4.05), (2, 4.6))
    box(shared, 1.7, 2.4, "layer 1", "f", 1.8)
    arrow(shared, (1.7, 0.2), (1.7, 2.05))
    arrow(shared, (1.7, 2.75), (1.7, 4.6))
    arrow(shared, (1.7, 3.4), (3.4, 3.4), (3.4, 1.3), (1.72, 1.3), color=BLUE)
    label(shared, 3.4, 2.4, "3 passes", rotation=90, backgroundcolor="white")
    return figure


PICTURES = {
    "placements": placements,
    "norms": norms,
    "streams": streams,
    "feed_forwards": feed_forwards,
    "initial": initial,
    "sharing": sharing,
}


def draw(folder: Path, names: Sequence[str] = tuple(PICTURES)) -> None:
    """Write blocks_<name>.png of each picture."""
    for name in names:
        figure = PICTURES[name]()
        figure.savefig(folder / f"blocks_{name}.png", dpi=100, metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).parent)
