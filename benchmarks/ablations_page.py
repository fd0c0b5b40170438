"""The page of the ablations: tables, plots and verdicts, all of them computed from results.json.

Intervals are percentile bootstraps at 95 % over seeds and requests: seeds are drawn with replacement, then as many requests as
there were for each. With two or three seeds they are rough, and rather too narrow.

    python benchmarks/ablations_page.py docs/assets/ablations.json docs         writes the page anew
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmbridge import hub

RESAMPLES = 10_000
INTRODUCTION = """\
# Results of the ablations

`python benchmarks/ablations.py --page docs` trains and measures all of this on two CPU cores; this page is written by it, from
`docs/assets/ablations.json`. The parts are the shipped tiny ones, the world is the [synthetic one](world.md): what holds here
need not hold for a 7B model and photographs. Pictures and sounds come in, pictures go out.

A figure is the share of {samples} requests per seed, on combinations that no training has seen, whose reply holds exactly the
media asked for with every factor right. Seeds: {seeds}, each with data, weights and requests of its own. Behind a mean
stands its 95 % interval, a bootstrap over seeds and requests; in the plots a point is a seed, a bar an interval, and the dotted
line what the decoder makes of the right captions (1 where none takes part). With so few seeds, intervals are rather too narrow, and
where all replies are right, or none, they have no width at all. Every variant has the learning rate that suits the reference,
which may favour that.

What the paper says is NExT-GPT's, arXiv 2309.05519. A difference counts as told apart where its interval leaves out zero.
"""


def interval(shares: Sequence[float], n: int, against: Sequence[float] | None = None) -> tuple[float, float, float]:
    """Return a mean over seeds, or the mean difference of two variants, with its 95 % interval.

    Args:
        shares: Share of right requests, by seed.
        n: Requests per seed.
        against: The same of a variant that is subtracted, with the same seeds.
    """
    rng = np.random.default_rng(0)
    seeds = rng.integers(len(shares), size=(RESAMPLES, len(shares)))

    def resample(values: Sequence[float]) -> Any:
        # Drawing n requests with replacement, of which a share is right, is a binomial draw.
        return (rng.binomial(n, np.asarray(values)[seeds]) / n).mean(axis=1)

    drawn, mean = resample(shares), float(np.mean(shares))
    if against is not None:
        drawn, mean = drawn - resample(against), mean - float(np.mean(against))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return mean, float(low), float(high)


def verdict(low: float, high: float, expected: str | None) -> str:
    """Return in words what the interval of a difference says, and whether the paper says so too."""
    if low <= 0 <= high:
        return "not told apart"
    found = "lower" if high < 0 else "higher"
    if expected is None:
        return found
    return f"{found}, as in the paper" if found == expected else f"**{found}, contrary to the paper**"


def shares_of(variant: Mapping[str, Any], cell: str) -> list[float]:
    """Return the share of right requests of each seed."""
    return [seed["cells"][cell]["share"] for seed in variant["seeds"].values()]


def page(results: Mapping[str, Any]) -> str:
    """Return the page as Markdown."""
    seeds = sorted({int(seed) for study in results["studies"].values() for one in study["variants"].values()
                    for seed in one["seeds"]})  # fmt: skip
    parts = [INTRODUCTION.format(samples=results["samples"], seeds=", ".join(map(str, seeds)))]
    for name, study in results["studies"].items():
        parts += [f"## {study['title']}\n", f"{study['question']}\n", f"The paper: {study['paper']}\n"]
        parts += [f"![{study['title']}: shares of right replies](assets/ablations-{name}.svg)\n"]
        parts += [_table(study, results["samples"]), _differences(study, results["samples"])]
    environment = "; ".join(f"{name} {value}" for name, value in results["environment"].items())
    return "\n".join([*parts, "## Ran on\n", f"{environment}.\n"])


def _table(study: Mapping[str, Any], n: int) -> str:
    lines = _row(
        ["variant", "steps", "trained parameters", *(f"{cell.replace(':', ' to ')}" for cell in study["cells"])]
    )
    for label, variant in study["variants"].items():
        one = next(iter(variant["seeds"].values()))
        figures = (interval(shares_of(variant, cell), n) for cell in study["cells"])
        shown = [f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in figures]
        trained = f"{one['trained']:,} ({100 * one['trained'] / one['parameters']:.1f} %)"
        lines += _row([label, f"{one['steps']:,}", trained, *shown])
    return "".join([lines[0], "|---" * (3 + len(study["cells"])) + "|\n", *lines[1:]])


def _differences(study: Mapping[str, Any], n: int) -> str:
    reference = study["variants"][study["reference"]]
    lines = _row([f"against {study['reference']}", "direction", "difference", "verdict"])
    for label, variant in study["variants"].items():
        if label == study["reference"]:
            continue
        for cell in study["cells"]:
            mean, low, high = interval(shares_of(variant, cell), n, shares_of(reference, cell))
            said = verdict(low, high, study["expected"].get(label))
            lines += _row([label, cell.replace(":", " to "), f"{mean:+.3f} ({low:+.3f} to {high:+.3f})", said])
    return "".join([lines[0], "|---|---|---|---|\n", *lines[1:]])


def _row(cells: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(cells)} |\n"]


def plot(study: Mapping[str, Any], n: int, path: Path) -> None:
    """Draw a study as SVG: one panel per direction, one line per variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = list(study["variants"])
    settings = {"svg.fonttype": "none", "svg.hashsalt": "mmbridge", "font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context(settings):
        size = (2.4 + 1.9 * len(study["cells"]), 0.9 + 0.36 * len(labels))
        figure, axes = pyplot.subplots(1, len(study["cells"]), sharey=True, squeeze=False, figsize=size)
        for cell, axis in zip(study["cells"], axes[0], strict=True):
            for place, variant in enumerate(study["variants"].values()):
                shares = shares_of(variant, cell)
                mean, low, high = interval(shares, n)
                axis.plot([low, high], [place, place], color="#3157c9", linewidth=5, alpha=0.3)
                axis.plot(shares, [place] * len(shares), "o", color="#3157c9", markersize=3.5, alpha=0.6)
                axis.plot([mean, mean], [place - 0.28, place + 0.28], color="#3157c9", linewidth=2)
            bounds = [
                seed["cells"][cell]["bound"] for one in study["variants"].values() for seed in one["seeds"].values()
            ]
            axis.axvline(float(np.mean(bounds)), color="#62656d", linewidth=1, linestyle=":")
            axis.set(title=cell.replace(":", " to "), xlim=(-0.03, 1.03), xticks=[0, 0.5, 1])
            axis.set_yticks(range(len(labels)), labels)
            axis.grid(axis="x", color="#e2dfd7")
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(length=0)
        axes[0][0].invert_yaxis()
        figure.tight_layout()
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def write_page(results: Mapping[str, Any], folder: Path) -> Path:
    """Write results.md, and its plots and figures into assets/; returns the page's path."""
    assets = folder / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    hub.write_json(assets / "ablations.json", results)
    for name, study in results["studies"].items():
        plot(study, results["samples"], assets / f"ablations-{name}.svg")
    path = folder / "results.md"
    path.write_text(page(results), encoding="utf-8")
    return path


if __name__ == "__main__":
    write_page(hub.read_json(Path(sys.argv[1])), Path(sys.argv[2]))
