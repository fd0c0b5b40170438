"""The benchmark of the projection experts runs; what it measures is not judged here."""

import runpy

import pytest
import torch


@pytest.fixture
def benchmark(root):
    return runpy.run_path(str(root / "benchmarks" / "mixture.py"))


def test_it_prints_its_table(benchmark, capsys):
    benchmark["main"](["--dim", "32", "--tokens", "9", "--batch", "2", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines[1:5]] == [
        "batched, pruned", "one by one, pruned", "batched, whole", "one by one, whole"
    ]  # fmt: skip
    assert lines[1].split()[-2:] == ["1.00", "1.00"]
    assert lines[5].startswith("router: ")


def test_variants_that_disagree_are_refused(benchmark):
    experts = benchmark["Experts"](2, 1, 16, 2, 24)
    variants = benchmark["create_variants"](experts, 3)
    wrong = {**variants, "wrong": lambda x: 1.01 * experts(x, 3)}
    benchmark["require_equal"](variants, torch.randn(2, 7, 16))
    with pytest.raises(SystemExit, match="'wrong' differs from 'batched, pruned' by"):
        benchmark["require_equal"](wrong, torch.randn(2, 7, 16))
