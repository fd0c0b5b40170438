"""The numbers of a self-check: of projections that bridges save, and of a language model's first layer."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mmbridge import hub
from mmbridge.backbones.causal_lm import first_layer
from mmbridge.bridge import Bridge
from mmbridge.conversion import probe
from mmbridge.conversion.files import Checkpoint
from mmbridge.errors import CheckpointError
from mmbridge.projections import InputProjection
from mmbridge.registry import projections as registry
from mmbridge.verification import verify

IN, OUT = "inputs.image.projection", "outputs.image.projection"


def build(name: str) -> nn.Module:
    sizes = {"dim_in": 16, "dim_out": 24}
    return registry.create(name, **registry.tiny(name)).build(
        **sizes if registry.get(name).direction == "in" else sizes | {"num_queries": 1}
    )


@pytest.mark.parametrize("name", registry.names())
def test_every_projection_has_numbers_that_its_weights_decide(name: str) -> None:
    module = build(name).train()
    module.bfloat16()
    found = probe.entry(IN, module)
    assert len(found["check"]["projection"]) == 8 and found["sizes"]["dim_in"] == 16
    assert probe.entry(IN, module) == found, "they are the same at every call"
    assert all(part.training for part in module.modules()) and next(module.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert probe.difference(found["check"]["projection"], probe.entry(IN, module)["check"]["projection"]) > 0.01


class Picky(InputProjection):
    """Takes five tokens, no more and no fewer."""

    def _create(self, dim_in: int, dim_out: int) -> None:
        self.layer = nn.Linear(5 * dim_in, dim_out)

    def _project(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1)).unsqueeze(1)


def test_what_can_not_be_run_is_saved_without(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        assert probe.entry(IN, build("linear")) == {}
    assert probe.entry(IN, None) == probe.entry(IN, nn.Linear(2, 2)) == {}
    with caplog.at_level(logging.WARNING):
        assert probe.entry(IN, Picky().build(dim_in=4, dim_out=6)) == {}
    assert f"no self-check of {IN} was stored" in caplog.text
    broken = build("linear")
    nn.init.constant_(next(broken.parameters()), torch.inf)
    assert probe.entry(IN, broken) == {}, "JSON has no infinity"


def findings(folder: Path) -> dict[str, tuple[bool | None, str]]:
    return {finding.part: (finding.whole, finding.text) for finding in verify(folder)}


@pytest.mark.parametrize("missing", [False, True])
def test_a_saved_bridge_is_checked_also_where_a_frozen_model_is_missing(
    parts: dict[str, str], tmp_path: Path, missing: bool
) -> None:
    Bridge.from_config(tiny.bridge_config(parts)).save_pretrained(tmp_path)
    config = hub.read_json(tmp_path / "config.json")
    if missing:
        config["backbone"]["source"] = "nobody/nothing"
        hub.write_json(tmp_path / "config.json", config)
    found = findings(tmp_path)
    for name in (IN, OUT):
        assert found[name][0] and found[name][1].endswith("hash, finite, shapes, self-check of projection")
    assert "self-check" not in found["outputs.image.rows"][1]
    config["outputs"]["image"]["projection"]["num_heads"] = 4  # the same weights, computed otherwise
    hub.write_json(tmp_path / "config.json", config)
    found = findings(tmp_path)
    assert found[IN][0]
    assert found[OUT][0] is False and found[OUT][1].startswith("self-check of projection is off by")


class Read(Mapping[str, Tensor]):
    """Tensors that remember which of them were asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors, self.names = tensors, set()

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(name)
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@torch.no_grad()
def test_the_first_layer_is_that_of_the_whole_model(tmp_path: Path) -> None:
    source = Path(tiny.llama(tmp_path / "source", num_hidden_layers=3))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    tensors = Read(Checkpoint(tmp_path / "shards"))
    found = first_layer(tmp_path / "shards", tensors)
    assert {name for name in tensors.names if "layers" in name} == {name for name in tensors if ".layers.0." in name}
    model = model.float().eval()
    model.model.layers = model.model.layers[:1]
    words = torch.linspace(0, model.config.vocab_size - 1, 8).long()
    torch.testing.assert_close(found, model.model(input_ids=words[None]).last_hidden_state, rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"first layer of .*shards can't be opened \('model"):
        first_layer(tmp_path / "shards", {})
