"""The plots of the report as SVG text: quality with intervals, size by tensor, error by layer.

matplotlib is imported inside, through its object interface alone (no pyplot, no global figure), since it takes a second
to load and only the report needs it. The SVG is reproducible: fixed salt, no date.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

Variant = Mapping[str, Any]

VERDICT_COLOURS = {
    "indistinguishable": "#15803d",
    "slightly worse": "#b45309",
    "inconclusive": "#64748b",
    "worse": "#dc2626",
    "broken": "#7f1d1d",
}
_SERIES = ("#2563eb", "#0d9488", "#ca8a04", "#db2777", "#7c3aed", "#ea580c", "#65a30d", "#475569")
_ROLES = {
    "embedding": ("embedding", "#94a3b8"),
    "attention": ("attention", "#2563eb"),
    "mlp": ("feed-forward", "#0d9488"),
    "head": ("output head", "#ca8a04"),
    "other": ("norms and biases", "#e11d48"),
}
_INK, _MUTED, _GRID = "#1e293b", "#64748b", "#e2e8f0"


def quality(variants: Sequence[Variant], rule: Mapping[str, float], confidence: float) -> str:
    """ΔNLL of each compressed model with its interval, against the margins of the verdict rule."""
    rows = [v for v in variants if v["comparison"]]
    figure, axes = _figure(8.6, 0.9 + 0.42 * len(rows))
    margin, slight, broken = rule["margin"], rule["slight"], rule["broken"]
    ends = [v["comparison"][end] for v in rows for end in ("delta_low", "delta_high")]
    finite = [end for end in ends if end is not None]
    right = max([slight * 1.5, *(1.25 * end for end in finite)])
    left = min([-margin * 0.6, *(1.25 * end for end in finite)])
    axes.set_xscale("symlog", linthresh=margin, linscale=0.9)
    axes.set_xlim(left, right)
    for start, stop, verdict, label in (
        (left, margin, "indistinguishable", "within the margin"),
        (margin, slight, "slightly worse", "slight"),
        (slight, min(broken, right), "worse", "worse"),
        (broken, right, "broken", "broken"),
    ):
        if start < stop:
            colour = VERDICT_COLOURS[verdict]
            axes.axvspan(start, stop, color=colour, alpha=0.07, linewidth=0)
            middle = _symlog_middle(max(start, 0), stop, margin)
            axes.text(middle, -0.75, label, ha="center", va="center", fontsize=8.5, color=colour)
    axes.axvline(0, color=_MUTED, linewidth=1)
    for row, variant in enumerate(rows):
        comparison = variant["comparison"]
        colour = VERDICT_COLOURS[comparison["verdict"]]
        if comparison["delta_nll"] is None:
            axes.text(right, row, "not finite ", ha="right", va="center", color=colour, fontsize=9.5, weight="bold")
            continue
        low, high = comparison["delta_low"], comparison["delta_high"]
        axes.plot([low, high], [row, row], color=colour, linewidth=3, solid_capstyle="butt", alpha=0.55)
        axes.plot([comparison["delta_nll"]], [row], "o", color=colour, markersize=7.5, markeredgecolor="white")
    axes.set_ylim(len(rows) - 0.4, -1.1)
    axes.set_yticks(range(len(rows)), [v["name"] for v in rows])
    ticks = sorted({0.0, margin, slight, broken, *(10.0**k for k in range(math.ceil(math.log10(slight)), 3))})
    axes.set_xticks([t for t in ticks if left <= t <= right], minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    axes.set_xlabel(f"ΔNLL against the original, nats per token, with {confidence:.0%} interval (paired)")
    axes.grid(False)
    return _svg(figure)


def size_by_tensor(variants: Sequence[Variant]) -> str:
    """Bytes of each model, split by what the tensors are for."""
    figure, axes = _figure(8.6, 1.2 + 0.36 * len(variants), top=0.42)
    unit, divisor = _unit(max(v["nbytes"] for v in variants))
    used = []
    for row, variant in enumerate(variants):
        left = 0.0
        totals = dict.fromkeys(_ROLES, 0)
        for leaf in variant["leaves"]:
            totals[leaf["role"]] += leaf["nbytes"]
        for role, total in totals.items():
            if total:
                axes.barh(row, total / divisor, left=left, height=0.66, color=_ROLES[role][1], linewidth=0)
                left += total / divisor
                used.append(role)
        label = f"{variant['nbytes'] / divisor:.3g} {unit}"
        axes.annotate(label, (left, row), (6, 0), textcoords="offset points", va="center", fontsize=9, color=_INK)
    for role in _ROLES:
        if role in used:
            axes.barh(0, 0, color=_ROLES[role][1], label=_ROLES[role][0])
    axes.set_yticks(range(len(variants)), [v["name"] for v in variants])
    axes.set_ylim(len(variants) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlabel(unit)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=9, ncols=5, loc="upper left", bbox_to_anchor=(0.145, 1.0))
    axes.grid(axis="x", color=_GRID)
    return _svg(figure)


def error_by_layer(variants: Sequence[Variant]) -> str | None:
    """Relative error of the compressed weights of each layer, or None where nothing is compressed by layer."""
    lines = [(v["name"], layer_errors(v)) for v in variants]
    lines = [(name, errors) for name, errors in lines if errors]
    if not lines:
        return None
    figure, axes = _figure(8.6, 3.6, right=0.12)
    last_points = []
    for index, (name, errors) in enumerate(lines):
        colour = _SERIES[index % len(_SERIES)]
        layers = sorted(errors)
        axes.plot(layers, [errors[k] for k in layers], "o-", color=colour, linewidth=1.8, markersize=4)
        last_points.append((errors[layers[-1]], layers[-1], name, colour))
    axes.set_yscale("log")
    top = max(max(errors.values()) for _, errors in lines) * 1.4
    bottom = min(min(errors.values()) for _, errors in lines) / 1.4
    axes.set_ylim(bottom, top)
    step = math.log(top / bottom) / 19  # the least distance between two labels
    height = -math.inf
    for value, layer, name, colour in sorted(last_points):
        height = max(math.log(value), height + step)
        place = (layer, math.exp(height))
        axes.annotate(
            name,
            place,
            (9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=colour,
            annotation_clip=False,
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{100 * value:g} %" if top / bottom < 10 else "")
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error of the weights")
    axes.grid(axis="y", color=_GRID)
    return _svg(figure)


def layer_errors(variant: Variant) -> dict[int, float]:
    """Root mean square of the relative errors of the compressed matrices of each layer."""
    squares: dict[int, list[float]] = {}
    for leaf in variant["leaves"]:
        for index, error in enumerate(leaf["errors"]):
            layer = leaf["layer"] if leaf["layer"] is not None else index if len(leaf["errors"]) > 1 else None
            if layer is not None and error is not None and error > 0:
                squares.setdefault(layer, []).append(error**2)
    return {layer: math.sqrt(sum(values) / len(values)) for layer, values in squares.items()}


def _symlog_middle(start: float, stop: float, threshold: float) -> float:
    """The value in the middle between two on a symlog axis whose linear part is `threshold` on either side."""

    def forward(x: float) -> float:
        return x / threshold * 0.9 if abs(x) <= threshold else math.copysign(0.9 + math.log10(abs(x) / threshold), x)

    y = (forward(start) + forward(stop)) / 2
    return y * threshold / 0.9 if abs(y) <= 0.9 else math.copysign(threshold * 10 ** (abs(y) - 0.9), y)


def _unit(nbytes: int) -> tuple[str, int]:
    for unit, divisor in (("GB", 10**9), ("MB", 10**6)):
        if nbytes >= divisor:
            return unit, divisor
    return "KB", 10**3


def _figure(width: float, height: float, *, top: float = 0.1, right: float = 0.02) -> tuple[Any, Any]:
    """A figure in inches with one plain axes; `top` in inches and `right` as a share of the width stay empty."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=None)
    axes = figure.add_axes((0.14, 0.55 / height, 0.86 - right, 1 - (0.55 + top) / height))
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(length=0, labelsize=9.5, labelcolor=_INK)
    axes.xaxis.label.set(size=9.5, color=_MUTED)
    axes.yaxis.label.set(size=9.5, color=_MUTED)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "effjax", "svg.fonttype": "none", "font.family": "sans-serif"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # the XML prologue has no place inside HTML
