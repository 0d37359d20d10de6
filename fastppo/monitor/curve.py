"""The learning curve: six panels that tell whether a run is healthy."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from fastppo.atomic import Pathlike, write_bytes

_PANELS = [
    ("Reward", "mean of the batch", ("env/reward_mean", "ppo/mean_scores")),
    ("KL from the reference", "nats per response", ("objective/kl",)),
    ("Response length", "tokens", ("tokens/responses_len_mean",)),
    ("Entropy of the policy", "nats per token", ("ppo/policy/entropy",)),
    ("Explained variance", "critic, at most 1", ("ppo/val/var_explained",)),
    ("Generation speed", "tokens per second", ("tokens/per_second",)),
]
_COLOUR, _HELD_OUT, _INK = "#2563a8", "#d1603d", "#333333"
# A critic that has not learnt anything yet can be any number below zero: the interesting part would become a line.
_WORST_EXPLAINED_VARIANCE = -1.0
_MIN_STEPS_TO_SMOOTH = 20


def draw_curve(rows: Sequence[Mapping[str, Any]], path: Pathlike) -> None:
    """Draw the steps of a run (the objects of metrics.jsonl) into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, unit, names) in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        points = _points(rows, names)
        _frame(axes, title, unit)
        if not points:
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color="#999999")
            continue
        if "variance" in title:
            points = [(step, max(_WORST_EXPLAINED_VARIANCE, value)) for step, value in points]
        _draw(axes, *zip(*points, strict=True))
        if title == "Reward":
            _draw_held_out(axes, _points(rows, ("eval/reward_mean",)))
        if unit.startswith("tokens"):  # from zero, or noise would look like news
            axes.set_ylim(0, 1.1 * max(value for _, value in points) or 1)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_bytes(path, picture.getvalue())


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Return the running mean over `window` values around each, fewer at the ends.

    >>> smoothed([0.0, 3.0, 6.0], 3)
    [1.5, 3.0, 4.5]
    """
    half = window // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def _points(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[tuple[int, float]]:
    """Return (step, value) under the first of the names that a row has."""
    found = [(row["step"], next((row[name] for name in names if name in row), None)) for row in rows]
    return [(step, value) for step, value in found if value is not None]


def _draw(axes: Any, steps: Sequence[int], values: Sequence[float]) -> None:
    if len(values) < _MIN_STEPS_TO_SMOOTH:
        axes.plot(steps, values, color=_COLOUR, linewidth=1.8, marker="o" if len(values) == 1 else None)
        return
    axes.plot(steps, values, color=_COLOUR, linewidth=0.8, alpha=0.35)
    axes.plot(steps, smoothed(values, max(3, len(values) // 12)), color=_COLOUR, linewidth=2)


def _draw_held_out(axes: Any, points: list[tuple[int, float]]) -> None:
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=_HELD_OUT, marker="o", markersize=4, linewidth=1, label="held-out prompts")
        axes.legend(frameon=False, fontsize=9)


def _frame(axes: Any, title: str, unit: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(f"{title} ({unit})", fontsize=10.5, color=_INK, loc="left")
    axes.set_xlabel("step", fontsize=9, color=_INK)
    axes.tick_params(labelsize=9, color="#bbbbbb", labelcolor=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(color="#e8e8e8", linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#bbbbbb")
