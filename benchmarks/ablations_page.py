"""The page of the ablations: tables, plots and verdicts, all of them computed from the figures of each paper's studies.

Intervals are percentile bootstraps at 95 % over seeds and requests: seeds are drawn with replacement, then as many requests as
there were for each. With two or three seeds they are rough, and rather too narrow.

    python benchmarks/ablations_page.py docs         writes docs/results.md anew, of the figures in docs/assets
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmbridge import hub

RESAMPLES = 10_000
UNKNOWN = "not told apart"
INTRODUCTION = """\
# Results of the ablations

`python benchmarks/ablations.py --page docs` trains and measures what stands under NExT-GPT, and `--studies onellm` beside it what
stands under OneLLM, each on two CPU cores; this page is written by it, from the figures in `docs/assets`. The parts are the shipped
tiny ones, the world is the [synthetic one](world.md): what holds here need not hold for a 7B model and photographs.

A figure is the share of requests, on combinations that no training has seen, whose reply holds exactly the media asked for
with every factor right. Each seed has data, weights and requests of its own. Behind a mean stands its 95 % interval, a bootstrap
over seeds and requests; in the plots a point is a seed, a bar an interval, and the dotted line what the decoder makes of the right
captions (1 where none takes part). With so few seeds, intervals are rather too narrow, and where all replies are right, or none,
they have no width at all. Every variant has the learning rate that suits the reference, which may favour that.

A difference counts as told apart where its interval leaves out zero.
"""
PAPERS = {
    "ablations": """\
## NExT-GPT

Pictures and sounds come in, pictures go out. What the paper says is NExT-GPT's, arXiv 2309.05519.
""",
    "onellm": """\
## OneLLM

Pictures, videos and sounds come in, words go out. What the paper says is OneLLM's, arXiv 2312.03700, tables 7 and 8. Its VQAv2,
MSVD-QA and Clotho-AQA stand for image, video and audio to text, and a difference of less than a point there counts as none.
""",
}
"""What the studies of each paper begin with, by the name of their file."""


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
        return UNKNOWN
    found = "lower" if high < 0 else "higher"
    if expected is None:
        return found
    return f"{found}, as in the paper" if found == expected else f"**{found}, contrary to the paper**"


class Difference(NamedTuple):
    """A variant against the reference of its study in one direction; ``expected`` is None where the paper has no difference."""

    variant: str
    cell: str
    mean: float
    low: float
    high: float
    expected: str | None

    @property
    def verdict(self) -> str:
        """What its interval says."""
        return verdict(self.low, self.high, self.expected)


def differences(study: Mapping[str, Any], n: int) -> Iterator[Difference]:
    """Yield what is measured of every variant, against the reference."""
    reference = study["variants"][study["reference"]]
    for label, variant in study["variants"].items():
        said = study["expected"].get(label)
        for cell in study["cells"] if label != study["reference"] else ():
            if is_measured(variant, cell):
                expected = said.get(cell) if isinstance(said, Mapping) else said
                yield Difference(
                    label, cell, *interval(shares_of(variant, cell), n, shares_of(reference, cell)), expected
                )


def is_measured(variant: Mapping[str, Any], cell: str) -> bool:
    """Return whether a variant has a figure of a cell."""
    return all(cell in seed["cells"] for seed in variant["seeds"].values())


def shares_of(variant: Mapping[str, Any], cell: str) -> list[float]:
    """Return the share of right requests of each seed."""
    return [seed["cells"][cell]["share"] for seed in variant["seeds"].values()]


def page(papers: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page as Markdown.

    Args:
        papers: Figures by the names in ``PAPERS``.
    """
    parts = [INTRODUCTION]
    for paper, introduction in PAPERS.items():
        if paper in papers:
            parts += [introduction, *_section(paper, papers[paper])]
    return "\n".join(parts)


def _section(paper: str, results: Mapping[str, Any]) -> Iterator[str]:
    studies, n = results["studies"], results["samples"]
    seeds = sorted(
        {int(seed) for study in studies.values() for one in study["variants"].values() for seed in one["seeds"]}
    )
    yield f"{n} requests per figure and seed; seeds: {', '.join(map(str, seeds))}. {_tally(studies.values(), n)}\n"
    for name, study in studies.items():
        yield f"### {study['title']}\n"
        yield f"{study['question']}\n"
        yield f"The paper: {study['paper']}\n"
        yield f"![{study['title']}: shares of right replies](assets/{paper}-{name}.svg)\n"
        yield _table(study, n)
        yield _differences(study, n)
    environment = "; ".join(f"{name} {value}" for name, value in results["environment"].items())
    yield f"Ran on: {environment}.\n"


def _tally(studies: Iterable[Mapping[str, Any]], n: int) -> str:
    """Return how many of the differences that the paper has are found."""
    said = [one.verdict for study in studies for one in differences(study, n) if one.expected]
    contrary, unknown = sum("contrary" in words for words in said), said.count(UNKNOWN)
    found = len(said) - contrary - unknown
    return (
        f"Of {len(said)} comparisons in which the paper has a difference, {found} come out as there, {contrary} the other "
        f"way round, and in {unknown} the variants are not told apart."
    )


def _table(study: Mapping[str, Any], n: int) -> str:
    lines = _row(
        ["variant", "steps", "trained parameters", *(f"{cell.replace(':', ' to ')}" for cell in study["cells"])]
    )
    for label, variant in study["variants"].items():
        one = next(iter(variant["seeds"].values()))
        shown = []
        for cell in study["cells"]:
            if is_measured(variant, cell):
                mean, low, high = interval(shares_of(variant, cell), n)
                shown.append(f"{mean:.3f} ({low:.3f} to {high:.3f})")
            else:
                shown.append("")
        trained = f"{one['trained']:,} ({100 * one['trained'] / one['parameters']:.1f} %)"
        lines += _row([label, f"{one['steps']:,}", trained, *shown])
    return "".join([lines[0], "|---" * (3 + len(study["cells"])) + "|\n", *lines[1:]])


def _differences(study: Mapping[str, Any], n: int) -> str:
    lines = _row([f"against {study['reference']}", "direction", "difference", "verdict"])
    for one in differences(study, n):
        difference = f"{one.mean:+.3f} ({one.low:+.3f} to {one.high:+.3f})"
        lines += _row([one.variant, one.cell.replace(":", " to "), difference, one.verdict])
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
                if not is_measured(variant, cell):
                    continue
                shares = shares_of(variant, cell)
                mean, low, high = interval(shares, n)
                axis.plot([low, high], [place, place], color="#3157c9", linewidth=5, alpha=0.3)
                axis.plot(shares, [place] * len(shares), "o", color="#3157c9", markersize=3.5, alpha=0.6)
                axis.plot([mean, mean], [place - 0.28, place + 0.28], color="#3157c9", linewidth=2)
            seeds = [seed["cells"] for one in study["variants"].values() for seed in one["seeds"].values()]
            bounds = [cells[cell]["bound"] for cells in seeds if cell in cells]
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


def write_page(paper: str, results: Mapping[str, Any], folder: Path) -> Path:
    """Write the figures and plots of a paper into assets/, and results.md with those of the others there; returns the page's path.

    Args:
        paper: One of ``PAPERS``.
        results: Its figures.
        folder: Where results.md goes.
    """
    assets = folder / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    hub.write_json(assets / f"{paper}.json", results)
    for name, study in results["studies"].items():
        plot(study, results["samples"], assets / f"{paper}-{name}.svg")
    path = folder / "results.md"
    path.write_text(page(read_figures(folder)), encoding="utf-8")
    return path


def read_figures(folder: Path) -> dict[str, Any]:
    """Return the figures of every paper that has some in a folder's assets/."""
    files = {paper: folder / "assets" / f"{paper}.json" for paper in PAPERS}
    return {paper: hub.read_json(file) for paper, file in files.items() if file.exists()}


if __name__ == "__main__":
    for name, figures in read_figures(Path(sys.argv[1])).items():
        write_page(name, figures, Path(sys.argv[1]))
