"""What batching OneLLM's projection experts and pruning their last block save, and what the router costs.

Experts of random weights, of the published width, read a medium: the learned tokens, then the encoder's. They are run as they
ship, all experts at once and the last block for the learned tokens only; one expert after the other; and with the last block for
all tokens. All variants run in turns in one process, and must agree, forward and backward. Seconds are the process's own
CPU seconds with one thread, so that what else the machine does counts little; the least of several repeats is taken. On a GPU
(``--device cuda``) they are elapsed seconds.

    python benchmarks/mixture.py                             two blocks an expert, a picture's 257 tokens
    python benchmarks/mixture.py --depth 8 --repeats 1       the published depth
    python benchmarks/mixture.py --tokens 9 --batch 8        fMRI
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmbridge.projections import MixtureOfExperts
from mmbridge.projections.mixture import Experts

Run = Callable[[Tensor], Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual, about in (
        ("depth", 2, "blocks of an expert (2; 8 as published)"),
        ("dim", 1024, "width (1024)"),
        ("tokens", 257, "tokens of the encoder (257)"),
        ("batch", 1, "media at once (1)"),
        ("repeats", 3, "runs of which the fastest counts (3)"),
    ):
        parser.add_argument(f"--{name}", type=int, default=usual, metavar="N", help=about)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.device(given.device):
        projection = MixtureOfExperts(given.dim, 4 * given.dim, dim_hidden=given.dim, depth=given.depth)
        x = torch.randn(given.batch, given.tokens, given.dim)
    both = torch.cat([projection.tokens.expand(given.batch, -1, -1), projection.project_in(x)], dim=1).detach()
    variants = create_variants(projection.experts, projection.tokens_out)
    require_equal(variants, both)
    report(measure(variants, both, given.repeats))
    with torch.no_grad():
        router = min(seconds(lambda: projection.weights(x[:1, :1]), given.device) for _ in range(20))
        whole = min(seconds(lambda: projection(x), given.device) for _ in range(given.repeats))
    print(f"router: {1000 * router:.1f} ms of {1000 * whole:.0f} ms for the whole projection ({router / whole:.1%})")


def create_variants(experts: Experts, queries: int) -> dict[str, Run]:
    """Return ways to compute the states of the first tokens, (B, T, dim) -> (K, B, queries, dim), the shipped one first."""
    apart = [Experts(1, *experts.sizes[1:]).to(next(experts.parameters()).device) for _ in range(experts.sizes[0])]
    for number, alone in enumerate(apart):  # each with parameters of its own
        alone.load_state_dict({name: value[number : number + 1] for name, value in experts.state_dict().items()})
    return {
        "batched, pruned": lambda x: experts(x, queries),
        "one by one, pruned": lambda x: torch.cat([alone(x, queries) for alone in apart]),
        "batched, whole": lambda x: experts(x, x.shape[1])[:, :, :queries],
        "one by one, whole": lambda x: torch.cat([alone(x, x.shape[1])[:, :, :queries] for alone in apart]),
    }


def require_equal(variants: dict[str, Run], x: Tensor) -> None:
    """Exit unless all agree with the first to 1e-5 of the largest number, forward and in the gradient of what comes in."""
    wanted: list[Tensor] = []
    for name, run in variants.items():
        given = x.clone().requires_grad_()
        made = run(given)
        found = [made.detach(), *torch.autograd.grad(made.square().sum(), given)]
        wanted = wanted or found
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))
        if error > 1e-5:
            raise SystemExit(f"{name!r} differs from {next(iter(variants))!r} by {error:.1e} of the largest number")


def measure(variants: dict[str, Run], x: Tensor, repeats: int) -> dict[str, list[float]]:
    """Return the least seconds of each variant: forward without gradients, and forward with backward."""
    found: dict[str, list[float]] = {name: [float("inf")] * 2 for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            with torch.no_grad():
                forward = seconds(lambda run=run: run(x), x.device.type)
            both = seconds(lambda run=run: run(x).sum().backward(), x.device.type)
            found[name] = [min(pair) for pair in zip(found[name], (forward, both), strict=True)]
    return found


def seconds(work: Callable[[], Any], device: str) -> float:
    """Return CPU seconds, or elapsed seconds on a GPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def report(found: dict[str, list[float]]) -> None:
    """Print a table; the last columns are how many times as long as the first variant each takes."""
    first = next(iter(found.values()))
    width = max(map(len, found))
    print(f"{'experts':<{width}}  forward, s  with backward, s  times as long")
    for name, (forward, both) in found.items():
        print(f"{name:<{width}}  {forward:10.4f}  {both:16.4f}  {forward / first[0]:5.2f}  {both / first[1]:6.2f}")


if __name__ == "__main__":
    main()
