"""Checkpoints: any nested state comes back exactly, damage is noticed, a failed save loses nothing."""

import json
import logging
import math
import resource
import signal

import pytest
import torch

from mmbridge.errors import CheckpointError
from mmbridge.training.checkpoint import checkpoints_in, latest_checkpoint, read_checkpoint, write_checkpoint

STATE = {
    "global_step": 7,
    "lr": 0.1 + 0.2,
    "flags": [True, None, "text", {"nested": (1, 2.5, ())}],
    "optimizer_states": [{"state": {0: {"exp_avg": torch.tensor([1e-45, 3.0])}, 1: {}}, "betas": (0.9, 0.999)}],
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "odd": {"inf": math.inf, "tensor": torch.tensor(3), "empty": torch.zeros(0, 2), 3.5: "float key"},
}


def same(first, second):
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and first == second


def test_nested_state_comes_back_exactly(tmp_path):
    write_checkpoint(STATE, tmp_path / "step-7")
    assert same(read_checkpoint(tmp_path / "step-7"), STATE)
    assert sorted(path.suffix for path in (tmp_path / "step-7").iterdir()) == [".json", ".safetensors"]


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    value = torch.arange(6.0)
    write_checkpoint({"a": value, "b": value[2:], "c": value.view(2, 3).T}, tmp_path / "step-1")
    state = read_checkpoint(tmp_path / "step-1")
    assert torch.equal(state["b"], value[2:])
    assert torch.equal(state["c"], value.view(2, 3).T)


@pytest.mark.parametrize("value", [object(), {1, 2}, torch.float32, lambda: 0])
def test_anything_but_tensors_and_plain_data_is_refused(tmp_path, value):
    with pytest.raises(CheckpointError, match="neither a tensor nor plain data"):
        write_checkpoint({"a": [value]}, tmp_path / "step-1")
    assert not (tmp_path / "step-1").exists()


def test_altered_or_incomplete_checkpoints_are_noticed(tmp_path):
    write_checkpoint(STATE, tmp_path / "step-1")
    file = tmp_path / "step-1" / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="altered"):
        read_checkpoint(tmp_path / "step-1")
    file.unlink()
    with pytest.raises(CheckpointError, match="can't be read"):
        read_checkpoint(tmp_path / "step-1")
    (tmp_path / "step-1" / "state.json").write_text('{"cut')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_checkpoint(tmp_path / "step-1")


def test_the_newest_whole_checkpoint_is_taken(tmp_path, caplog):
    for step in (2, 10, 9):
        write_checkpoint({"step": step}, tmp_path / f"step-{step}")
    (tmp_path / ".step-11.draft-1").mkdir()
    (tmp_path / "step-x").mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-10", "step-9", "step-2"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-10"
    (tmp_path / "step-10" / "tensors.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "mmbridge"):
        assert latest_checkpoint(tmp_path) == tmp_path / "step-9"
    assert "passing over a damaged checkpoint" in caplog.text
    for step in (2, 9):
        (tmp_path / f"step-{step}" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        latest_checkpoint(tmp_path)


def test_no_checkpoint_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_a_file_that_cannot_grow_keeps_the_earlier_checkpoint(tmp_path):
    write_checkpoint({"value": torch.zeros(4)}, tmp_path / "step-1")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match="what was there before is unchanged"):
            write_checkpoint({"value": torch.ones(4000)}, tmp_path / "step-1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.equal(read_checkpoint(tmp_path / "step-1")["value"], torch.zeros(4))
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_state_is_plain_json(tmp_path):
    write_checkpoint({"a": torch.ones(2), "b": 1}, tmp_path / "step-1")
    record = json.loads((tmp_path / "step-1" / "state.json").read_text())
    assert record["format"] == 1
    assert record["state"] == {"dict": [["a", {"tensor": "0"}], ["b", 1]]}
