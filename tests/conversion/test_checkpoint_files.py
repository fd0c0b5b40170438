"""Reading published files and writing parts: lazily, a tensor at a time, and one clear error for each kind of damage."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmbridge.conversion.files import Checkpoint, resumable_folder, write_tensors
from mmbridge.conversion.keymap import Target
from mmbridge.errors import CheckpointError

STATE = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "a.half": torch.linspace(-2, 2, 7).half(),
    "b.scalar": torch.tensor(3.5),
    "b.count": torch.tensor([1, 2, 3]),
    "b.brain": torch.linspace(-9, 9, 5).bfloat16(),
}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
    )


def write(folder: Path, layout: str) -> Path:
    """Write STATE in one of the layouts that are read; returns what to open."""
    first, second = ({name: value for name, value in STATE.items() if name[0] == letter} for letter in "ab")
    if layout == "safetensors":
        save_file(STATE, folder / "model.safetensors")
        return folder / "model.safetensors"
    if layout in ("pt", "bin"):
        torch.save(STATE, folder / f"weights.{layout}")
        return folder / f"weights.{layout}"
    if layout == "pth shards":
        torch.save(first, folder / "consolidated.00.pth")
        torch.save(second, folder / "consolidated.01.pth")
        return folder
    save_file(first, folder / "model-1.safetensors")
    save_file(second, folder / "model-2.safetensors")
    if layout == "indexed shards":
        places = {name: f"model-{1 if name in first else 2}.safetensors" for name in STATE}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        save_file({"other": torch.zeros(1)}, folder / "of-something-else.safetensors")
    return folder


@pytest.mark.parametrize("layout", ["safetensors", "pt", "bin", "pth shards", "shards", "indexed shards"])
def test_every_layout_gives_the_same_tensors(tmp_path, layout):
    state = Checkpoint(write(tmp_path, layout))
    assert same(dict(state), STATE)
    assert {name: (value.shape, value.dtype) for name, value in state.meta.items()} == {
        name: (value.shape, value.dtype) for name, value in STATE.items()
    }
    assert {value.device.type for value in state.meta.values()} == {"meta"}
    state.release()
    assert torch.equal(state["a.weight"], STATE["a.weight"])


def test_files_that_are_no_checkpoints_are_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r"no file or folder .*absent\.pt; give the published weights"):
        Checkpoint(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match=r"holds no weights \(\*\.safetensors, \*\.pt, \*\.pth, \*\.bin\)"):
        Checkpoint(tmp_path)
    for name in ("page.pth", "page.safetensors"):
        (tmp_path / name).write_text("<html>not found</html>")
        with pytest.raises(CheckpointError, match=rf"{name} is damaged or not a checkpoint .*download it again"):
            Checkpoint(tmp_path / name)
    torch.save({"model": STATE, "epoch": 3}, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match=r"run\.pt holds dict 'model' where tensors by name are wanted"):
        Checkpoint(tmp_path / "run.pt")
    torch.save(torch.zeros(3), tmp_path / "one.pt")
    with pytest.raises(CheckpointError, match=r"one\.pt holds no tensors where tensors by name are wanted"):
        Checkpoint(tmp_path / "one.pt")


@pytest.mark.parametrize("layout", ["safetensors", "pt"])
@pytest.mark.parametrize("left", [0, 40, 0.5, 0.99])
def test_truncated_files_are_one_sentence(tmp_path, layout, left):
    file = write(tmp_path, layout)
    size = file.stat().st_size
    os.truncate(file, int(size * left) if left < 1 else left)
    with pytest.raises(
        CheckpointError, match=r"is damaged or not a checkpoint .*download it again, and compare its size"
    ):
        Checkpoint(file)


def test_a_pickle_that_asks_to_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({**STATE, "evil": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil\.pt asks to run code .* was not opened \(.*mkdir"):
        Checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_shards_that_do_not_fit_together_are_named(tmp_path):
    folder = write(tmp_path, "indexed shards")
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**places, "c": "model-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lack what their index names: c\."):
        Checkpoint(folder)
    index.write_text(json.dumps({"weight_map": {**places, "c": "model-3.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names model-3\.safetensors, and .* does not hold them; download"):
        Checkpoint(folder)
    index.unlink()
    save_file({"a.half": torch.zeros(1)}, folder / "model-9.safetensors")
    with pytest.raises(CheckpointError, match=r"model-1.* and model-9.* both hold a\.half"):
        Checkpoint(folder)


def written(
    folder: Path, state: dict[str, Tensor], dtype: torch.dtype | None = None, **targets: Target
) -> dict[str, Tensor]:
    torch.save(state, folder / "in.pt")
    source = Checkpoint(folder / "in.pt")
    write_tensors(folder / "out.safetensors", targets or {name: Target((name,)) for name in state}, source, dtype)
    return load_file(folder / "out.safetensors")


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32])
def test_floats_are_cast_and_the_rest_is_kept(tmp_path, dtype):
    wanted = {
        name: value.to(dtype) if dtype is not None and value.is_floating_point() else value
        for name, value in STATE.items()
    }
    assert same(written(tmp_path, STATE, dtype), wanted)


def test_tensors_are_made_from_several(tmp_path):
    state = {"x": torch.randn(3, 2), "y": torch.randn(3, 2)}
    made = written(
        tmp_path,
        state,
        stacked=Target(("y", "x"), lambda y, x: torch.stack([y, x])),
        turned=Target(("x",), lambda x: x.T),
        row=Target(("y",), lambda y: y[1:2]),
    )
    wanted = {"stacked": torch.stack([state["y"], state["x"]]), "turned": state["x"].T, "row": state["y"][1:2]}
    assert same(made, wanted)


def test_tensors_larger_than_a_piece_are_whole(tmp_path):
    state = {"long": torch.randn(1025, 2049)}
    assert same(written(tmp_path, state, torch.float16), {"long": state["long"].half()})


def test_values_that_are_not_finite_are_refused(tmp_path):
    spoilt = torch.ones(4)
    spoilt[2] = torch.nan
    with pytest.raises(CheckpointError, match=r"a \(from a\) holds 1 values that are not finite; the file is damaged"):
        written(tmp_path, {"a": spoilt})
    with pytest.raises(CheckpointError, match=r"b .*not finite"):
        written(tmp_path, {"b": torch.tensor([torch.inf])})
    with pytest.raises(CheckpointError, match=r"c has values too large for torch\.float16; .*--dtype bfloat16"):
        written(tmp_path, {"c": torch.tensor([1e6])}, torch.float16)
    mask = torch.full((3, 3), -torch.inf).triu(1)
    assert same(written(tmp_path, {"text.mask": mask}), {"text.mask": mask})  # ImageBind's file holds one
    with pytest.raises(CheckpointError, match=r"not finite"):
        written(tmp_path, {"text.mask": spoilt})


def test_finished_files_are_kept_until_all_is_written(tmp_path):
    target, made = tmp_path / "out", []

    def write_as(text: str):
        def write(file: Path, *begun: object) -> str:
            made.append(text)
            file.write_text(text)
            return hashlib.sha256(text.encode()).hexdigest()

        return write

    def run(identity: str, stop: bool = False) -> None:
        with resumable_folder(target, {"of": identity}) as draft:
            draft.add("a/1", write_as("one"))
            draft.add("2", write_as("two"))
            if stop:
                raise KeyboardInterrupt
            draft.add("3", write_as("three"))

    with pytest.raises(KeyboardInterrupt):
        run("x", stop=True)
    assert not target.exists()
    (tmp_path / ".out.unfinished" / "2").write_text("torn")
    run("x")
    assert made == ["one", "two", "two", "three"]  # what was whole is not made again, what was torn is
    assert [(target / name).read_text() for name in ("a/1", "2", "3")] == ["one", "two", "three"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with pytest.raises(CheckpointError, match="out exists already and was not overwritten; name another place"):
        run("x")
    target.rename(tmp_path / "first")
    with pytest.raises(KeyboardInterrupt):
        run("x", stop=True)
    made.clear()
    run("y")
    assert made == ["one", "two", "three"], "what was made from something else is not kept"


def test_a_file_goes_on_between_two_tensors(tmp_path):
    state = {name: torch.full(((1 << 19) + number,), float(number)) for number, name in enumerate("abcd")}
    save_file(state, tmp_path / "in.safetensors")
    source, made = Checkpoint(tmp_path / "in.safetensors"), []

    def run(target: Path, stop: str = "") -> str:
        def target_of(name: str) -> Target:
            def make(tensor: Tensor) -> Tensor:
                if not tensor.is_meta:
                    if name == stop:
                        raise KeyboardInterrupt
                    made.append(name)
                return tensor

            return Target((name,), make)

        targets = {name: target_of(name) for name in state}
        with resumable_folder(target, {}) as draft:
            return draft.add(
                "x", lambda file, *begun: write_tensors(file, targets, source, torch.float64, lambda n: None, *begun)
            )

    def interrupted() -> Path:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", stop="d")
        made.clear()
        return tmp_path / ".out.unfinished" / "x.half"

    whole = run(tmp_path / "whole")
    assert made == list(state)
    wanted = (tmp_path / "whole" / "x").read_bytes()
    for damage, again in (
        (lambda half: None, ["d"]),
        (lambda half: half.open("ab").write(b"torn"), ["d"]),
        (lambda half: os.truncate(half, 100), list(state)),
        (lambda half: half.write_bytes(b"x" * half.stat().st_size), list(state)),
        (lambda half: half.unlink(), list(state)),
    ):
        damage(interrupted())
        assert run(tmp_path / "out") == whole and made == again
        assert (tmp_path / "out" / "x").read_bytes() == wanted
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]
        (tmp_path / "out").rename(tmp_path / f"done{len(list(tmp_path.iterdir()))}")


def test_a_full_disk_is_told_beforehand(tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"out needs .* GB, but its disk has .* GB free; make room"),
        resumable_folder(tmp_path / "out", {}, 1 << 60),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
