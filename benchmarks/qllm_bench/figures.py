"""Figures of results, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qllm_bench.arguments import short

_COLOURS = ("#3b6ea5", "#c8553d", "#588157", "#8e6c8a", "#d9a441", "#5f6c7b", "#2a9d8f", "#9c6644")


def _plot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def heatmaps(
    path: Path,
    panels: Mapping[str, Mapping[tuple[int, Any], Mapping[str, Any]]],
    lengths: Sequence[int],
    rows: Sequence[Any],
    ylabel: str,
) -> Path:
    """Share of right answers by length and something else, a panel per setting.

    Args:
        path: The PNG.
        panels: Title to summaries (`scores.summarise`) by (length, row).
        lengths: Columns.
        rows: Rows, top to bottom.
        ylabel: What the rows are.
    """
    plt = _plot()
    wide = min(4, len(panels))
    high = -(-len(panels) // wide)
    size = (1.6 + wide * max(2.2, 0.62 * len(lengths)), high * (0.9 + 0.34 * len(rows)) + 0.5)
    figure, axes = plt.subplots(high, wide, figsize=size, squeeze=False, layout="constrained")
    image = None
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, cells) in zip(axes.flat, panels.items(), strict=False):
        table = [[cells[n, row]["share"] if (n, row) in cells else float("nan") for n in lengths] for row in rows]
        image = axis.imshow(table, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(rows):
            for x, n in enumerate(lengths):
                if (n, row) in cells:
                    share = cells[n, row]["share"]
                    colour = "black" if share > 0.6 else "white"
                    axis.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_xticks(range(len(lengths)), [short(n) for n in lengths], fontsize=8)
        axis.set_yticks(range(len(rows)), [str(row) for row in rows], fontsize=8)
        axis.set_title(title, fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("tokens", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel(ylabel, fontsize=8)
    figure.colorbar(image, ax=axes, label="share of right answers", shrink=0.8)
    return _save(plt, figure, path)


def lines(
    path: Path,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]]],
    xlabel: str,
    ylabel: str = "share of right answers",
) -> Path:
    """Scores with their 95 % intervals along something, a line per setting; the x axis is logarithmic.

    Args:
        path: The PNG.
        panels: Title to lines; name of a line to its (x, summary) pairs.
        xlabel, ylabel: Names of the axes.
    """
    plt = _plot()
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    ticks = sorted({x for series in panels.values() for points in series.values() for x, _ in points})
    size = (1.2 + 4.4 * len(panels), 3.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis, (title, series) in zip(axes.flat, panels.items(), strict=True):
        for name, points in series.items():
            colour = _COLOURS[names.index(name) % len(_COLOURS)]
            xs = [x for x, _ in points]
            axis.plot(xs, [s["share"] for _, s in points], marker="o", ms=4, color=colour, label=name)
            low, high = zip(*(s["interval"] for _, s in points), strict=True)
            axis.fill_between(xs, low, high, color=colour, alpha=0.1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [short(int(x)) for x in ticks], fontsize=8)
        axis.minorticks_off()
        axis.set_ylim(-0.02, 1.02)
        axis.set_xlabel(xlabel)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel(ylabel)
    handles = {name: line for axis in axes.flat for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(names)), fontsize=8)
    return _save(plt, figure, path)


def intervals(
    path: Path, groups: Mapping[str, Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]]], series: Sequence[str]
) -> Path:
    """Scores of named settings as points with their intervals, a panel per group.

    Args:
        path: The PNG.
        groups: Title to (name of the setting, its summaries by series).
        series: What summaries are of, e.g. development and test documents; each has its colour whether there are any or not.
    """
    plt = _plot()
    wide = min(3, len(groups))
    high = -(-len(groups) // wide)
    tallest = max(len(rows) for rows in groups.values())
    size = (1 + 3.6 * wide, high * (1.0 + 0.34 * tallest))
    figure, axes = plt.subplots(high, wide, figsize=size, squeeze=False, sharex=True, layout="constrained")
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis, (title, rows) in zip(axes.flat, groups.items(), strict=False):
        for number, name in enumerate(series):
            shift = (number - (len(series) - 1) / 2) * 0.22
            for y, (_, summaries) in enumerate(rows):
                if name not in summaries:
                    continue
                colour = _COLOURS[number]
                axis.plot(summaries[name]["interval"], [y + shift] * 2, color=colour, lw=1.5, label=name)
                axis.plot(summaries[name]["share"], y + shift, "o", ms=4, color=colour)
        axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(-0.02, 1.02)
        axis.set_title(title, fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    if len(series) > 1:
        drawn = {n: line for axis in axes.flat for line, n in zip(*axis.get_legend_handles_labels(), strict=True)}
        handles = {name: drawn[name] for name in series if name in drawn}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(series), fontsize=8)
    return _save(plt, figure, path)


def costs(path: Path, cells: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Path:
    """Costs by length, a panel per column and a line per policy; both axes are logarithmic.

    Args:
        path: The PNG.
        cells: Labels ``tokens`` and ``policy`` with the columns.
        columns: Column to title.
    """
    plt = _plot()
    from matplotlib import ticker

    policies = list(dict.fromkeys(cell["policy"] for cell in cells))
    lengths = sorted({cell["tokens"] for cell in cells})
    figure, axes = plt.subplots(1, len(columns), figsize=(3.1 * len(columns), 3.3), layout="constrained")
    for axis, (column, title) in zip(axes, columns.items(), strict=True):
        for number, policy in enumerate(policies):
            points = [(cell["tokens"], cell[column]) for cell in cells if cell["policy"] == policy]
            colour = _COLOURS[number % len(_COLOURS)]
            axis.plot(*zip(*points, strict=True), marker="o", ms=4, color=colour, label=policy)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_xticks(lengths, [short(n) for n in lengths], fontsize=8)
        axis.minorticks_off()
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("tokens read", fontsize=8)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(policies), fontsize=8)
    return _save(plt, figure, path)


def _save(plt: Any, figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
