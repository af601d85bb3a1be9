"""A comparison of packers as a page or a picture: the table, lengths, what padding wastes, efficiency, packs.

write_report(compare_packers(read_histogram("lengths.npy"), 512), "report.html")

.html: one file, pictures inside.    .png: the pictures with the table under them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from html import escape
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from packing.plan import PackPlan
from packing.report.compare import COLUMNS, NOTES, Comparison, depth_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

TOKENS, UNUSED, INK = "#0072b2", "#d9d9d9", "#333333"  # distinct for the colour-blind, and in grey
LENGTH_BARS = 64
PICTURED_PACKS = 48


def write_report(comparisons: Comparison | Mapping[str, Comparison], path: str | PathLike) -> None:
    """Write an .html or .png file, with several comparisons, by title, one under the other.

    Needs matplotlib: pip install 'dataset-packing[report]'.
    """
    write = check_report(path)
    if isinstance(comparisons, Comparison):
        comparisons = {"": comparisons}
    write(comparisons, Path(path))


def check_report(path: str | PathLike) -> Callable[[Mapping[str, Comparison], Path], None]:
    """The writer for the path's ending. Raises whatever write_report would raise, before any work is done."""
    ending = Path(path).suffix.lower()
    if ending not in WRITERS:
        raise ValueError(f"a report is written as {' or '.join(WRITERS)}, by the file's ending; got {str(path)!r}")
    if Path(path).is_dir():
        raise IsADirectoryError(f"the report {str(path)!r} is a folder; give the name of a file in it")
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(Path(path).parent)!r} for the report {path}; make it first")
    _new_figure()
    return WRITERS[ending]


# Pictures


def pictures(comparison: Comparison) -> Figure:
    """All four, in one figure."""
    figure = _new_figure(figsize=(13, 8.5))
    _draw_all(figure, comparison)
    return figure


def draw_lengths(axes: Axes, comparison: Comparison) -> None:
    """Sequences of each length."""
    edges, bars = _bars(comparison.histogram)
    axes.stairs(bars, edges, fill=True, color=TOKENS)
    axes.set(title="sequences by length", xlabel="tokens in the sequence", ylabel="sequences", xlim=(0, edges[-1]))
    _thousands(axes)


def draw_padding(axes: Axes, comparison: Comparison) -> None:
    """Token slots of rows with one sequence each, by the sequence's length: tokens below, padding on top."""
    lengths = np.arange(len(comparison.histogram))
    edges, tokens = _bars(comparison.histogram * lengths)
    _, slots = _bars(comparison.histogram * comparison.max_sequence_length)
    axes.stairs(slots, edges, baseline=tokens, fill=True, color=UNUSED, label="padding")
    axes.stairs(tokens, edges, fill=True, color=TOKENS, label="tokens")
    wasted = 1 - comparison.padded.packing_efficiency
    axes.set(title=f"one sequence in a row: {wasted:.1%} of the token slots are padding")
    axes.set(xlabel="tokens in the sequence", ylabel="token slots", xlim=(0, edges[-1]))
    axes.legend(loc="upper left", frameon=False)
    _thousands(axes)


def draw_efficiency(axes: Axes, comparison: Comparison) -> None:
    """Packing efficiency against the depth limit, one line a packer, under the line that the best bound allows."""
    limits = list(dict.fromkeys(attempt.max_sequences_per_pack for attempt in comparison.attempts))
    limits.sort(key=lambda limit: np.inf if limit is None else limit)
    slots = [comparison.lower_bound(limit) * comparison.max_sequence_length for limit in limits]
    places = {limit: place for place, limit in enumerate(limits, start=1)}
    padded = comparison.padded.packing_efficiency
    possible = [comparison.padded.num_tokens / slot for slot in slots]
    axes.plot([0, *places.values()], [padded, *possible], color=INK, ls=":", label="no packing is better")
    for number, name in enumerate(dict.fromkeys(attempt.packer for attempt in comparison.plans)):
        found = {a.max_sequences_per_pack: a.plan for a in comparison.plans if a.packer == name}
        x = [0, *(places[limit] for limit in found)]
        y = [padded, *(plan.packing_efficiency for plan in found.values())]
        axes.plot(x, y, marker="os^Dvx"[number % 6], ms=5, lw=1.5, alpha=0.8, label=name)
    axes.set_xticks(range(len(limits) + 1), ["1", *(depth_name(limit) for limit in limits)])
    axes.set(title="packing efficiency", xlabel="sequences in a pack at most", ylabel="tokens / token slots")
    axes.set_ylim(None, 1.005)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower right", frameon=False)


def draw_packs(axes: Axes, plan: PackPlan) -> None:
    """Some packs, each a column of its sequences, longest at the bottom; the grey rest is padding.

    They stand for all packs, in order of depth and content: one from each of PICTURED_PACKS equal shares.
    """
    contents = [strategy[::-1] for strategy in plan.strategies]  # longest first
    order = sorted(range(len(contents)), key=lambda s: (len(contents[s]), [-length for length in contents[s]]))
    last = np.cumsum(plan.repeats[order] / plan.num_packs)  # the share of packs up to and with each strategy
    pictured = min(PICTURED_PACKS, plan.num_packs)
    chosen = np.minimum(np.searchsorted(last, (np.arange(pictured) + 0.5) / pictured), len(order) - 1)
    axes.bar(range(pictured), plan.max_sequence_length, width=0.9, color=UNUSED)
    shades = ["#0072b2", "#56b4e9", "#009e73", "#e69f00", "#cc79a7"]
    for place, strategy in enumerate(chosen):
        lengths = contents[order[strategy]]
        bottoms = np.cumsum([0, *lengths[:-1]])
        colors = [shades[i % len(shades)] for i in range(len(lengths))]
        edge = 0.4 if len(lengths) < 20 else 0  # edges would hide short sequences
        axes.bar([place] * len(lengths), lengths, 0.9, bottoms, color=colors, edgecolor="white", linewidth=edge)
    depth = depth_name(plan.max_sequences_per_pack)
    axes.set(title=f"how packs are filled: {plan.packer}, depth {depth}", ylabel="token slots")
    axes.set(xlabel=f"{pictured} of {plan.num_packs:,} packs, by depth", xticks=[])
    axes.set(xlim=(-1, pictured), ylim=(0, plan.max_sequence_length))


def _draw_all(figure: FigureBase, comparison: Comparison) -> None:
    grid = figure.subplots(2, 2)
    draw_lengths(grid[0, 0], comparison)
    draw_padding(grid[0, 1], comparison)
    draw_efficiency(grid[1, 0], comparison)
    if comparison.recommended is None:
        grid[1, 1].set_axis_off()
    else:
        draw_packs(grid[1, 1], comparison.recommended.plan)


def _bars(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values by length, summed into at most LENGTH_BARS bars of equal width: edges and heights."""
    longest = len(values) - 1
    width = -(-longest // LENGTH_BARS)
    padded = np.zeros(-(-longest // width) * width)
    padded[:longest] = values[1:]  # there is no length 0
    return np.arange(len(padded) // width + 1) * width + 0.5, padded.reshape(-1, width).sum(axis=1)


def _thousands(axes: Axes) -> None:
    """1.5M in place of 1.5 and 1e6."""
    from matplotlib.ticker import EngFormatter

    axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _new_figure(**options: Any) -> Figure:
    """A figure outside pyplot's windows and global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "pictures need matplotlib, which is not installed: pip install 'dataset-packing[report]'"
        ) from None
    return Figure(layout="constrained", **options)


# Files


def _write_png(comparisons: Mapping[str, Comparison], path: Path) -> None:
    heights = [9 + 0.2 * (str(comparison).count("\n") + 3) for comparison in comparisons.values()]
    figure = _new_figure(figsize=(13, sum(heights)))
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for (title, comparison), part, height in zip(comparisons.items(), parts, heights, strict=True):
        above, below = part.subfigures(2, 1, height_ratios=[9, height - 9])
        above.suptitle(title or None, fontweight="bold")
        _draw_all(above, comparison)
        below.text(0.02, 0.95, str(comparison), family="monospace", fontsize=9, va="top", parse_math=False)
    figure.savefig(path, dpi=110)


def _write_html(comparisons: Mapping[str, Comparison], path: Path) -> None:
    sections = "".join(_section(title, comparison) for title, comparison in comparisons.items())
    notes = "".join(f"<li>{escape(note)}</li>" for note in NOTES)
    path.write_text(PAGE.format(sections=sections, notes=notes), encoding="utf-8")


def _section(title: str, comparison: Comparison) -> str:
    image = io.BytesIO()
    pictures(comparison).savefig(image, format="png", dpi=110)
    source = base64.b64encode(image.getvalue()).decode()
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    recommended = comparison.recommended
    chosen = "" if recommended is None else f"<h3>Recommended plan</h3><pre>{escape(str(recommended.plan))}</pre>"
    alt = "sequences by length; what padding wastes; efficiency against depth; how packs are filled"
    return (
        f"{heading}<p>{escape(comparison.summary())}</p>{_table(comparison)}{chosen}"
        f'<img alt="{alt}" src="data:image/png;base64,{source}">'
    )


def _table(comparison: Comparison) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    lines = []
    for attempt, row in comparison.rows():
        if "refusal" in row:
            cells = [row["packer"], row["depth"]]
            tail = f'<td class="refused" colspan="{len(COLUMNS) - 2}">refused: {escape(row["refusal"])}</td>'
        else:
            cells, tail = [row[name] for name in COLUMNS], ""
        chosen = attempt is comparison.recommended
        body = "".join(f"<td>{escape(cell)}</td>" for cell in cells) + tail
        lines.append(f'<tr class="chosen">{body}</tr>' if chosen else f"<tr>{body}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Packing report</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child, td.refused {{ text-align: left }}
td.refused {{ color: #a33 }}
tr.chosen {{ background: #e3f0fa; font-weight: 600 }}
img {{ max-width: 100% }}
pre {{ background: #f6f6f6; padding: .7rem; overflow-x: auto }}
</style></head><body>
<h1>Packing report</h1>
{sections}
<ul>{notes}</ul>
</body></html>
"""

WRITERS = {".html": _write_html, ".png": _write_png}
