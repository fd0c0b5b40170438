"""From samples to batches: frozen work once, and an order that depends on seed and step alone."""

import json

import pytest
import tiny
import torch

from mmbridge.bridge import Bridge
from mmbridge.data.features import FeatureStore
from mmbridge.data.loader import StepBatches, held_batches, prepare_all, step_seed, window_batches
from mmbridge.data.samples import JsonlData
from mmbridge.errors import DataError


@pytest.fixture(scope="module")
def bridge(parts):
    torch.manual_seed(0)
    return Bridge.from_config(tiny.bridge_config(parts))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return JsonlData(tiny.colours_file(tmp_path_factory.mktemp("data"), 10))


@pytest.fixture(scope="module")
def prepared(bridge, data):
    return prepare_all(bridge, data, FeatureStore(None), progress=False)


def same(first, second):
    return (
        torch.equal(first.ids, second.ids)
        and first.seed == second.seed
        and all(
            torch.equal(one.content, two.content)
            for name, spans in first.entering.items()
            for one, two in zip(spans, second.entering[name], strict=True)
        )
    )


def test_every_epoch_holds_every_sample_once_in_an_order_of_its_own():
    lengths = [1 + index * 7 % 11 for index in range(32)]
    epochs = [window_batches(lengths, 4, 0, window) for window in range(6)]  # 8 batches of 4 are an epoch of 32
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [4] * 8
        assert sorted(index for batch in epoch for index in batch) == list(range(32))
    assert len({str(epoch) for epoch in epochs}) == 6


def test_epochs_that_fill_no_window_go_on_in_the_next():
    places = [index for window in range(5) for batch in window_batches([1] * 10, 4, 0, window) for index in batch]
    assert sorted(places) == sorted([*range(10)] * 16)


def test_samples_of_similar_length_share_a_batch():
    lengths = [int(length) for length in torch.randint(10, 90, (500,))]
    batches = [batch for window in range(4) for batch in window_batches(lengths, 16, 0, window)]
    filled = [sum(lengths[index] for index in batch) / max(lengths[index] for index in batch) / 16 for batch in batches]
    assert sum(filled) / len(filled) > 0.75  # 0.55 in the order of drawing


def test_answers_of_slightly_different_length_are_mixed():
    lengths = [20 + index % 4 for index in range(512)]
    batches = [batch for window in range(8) for batch in window_batches(lengths, 16, 0, window)]
    kinds = [len({lengths[index] for index in batch}) for batch in batches]
    assert sum(kinds) / len(kinds) > 3


def test_requests_for_different_media_are_mixed():
    lengths = [34 if index % 3 else 43 for index in range(960)]  # what asks for 4 signals and for 12
    batches = [batch for window in range(10) for batch in window_batches(lengths, 32, 0, window)]
    mixed = [len({lengths[index] for index in batch}) == 2 for batch in batches]
    assert sum(mixed) / len(mixed) > 0.6


def test_order_depends_on_the_seed_and_step_alone():
    lengths = list(range(1, 101))
    assert window_batches(lengths, 8, 3, 17) == window_batches(lengths, 8, 3, 17)
    assert window_batches(lengths, 8, 3, 17) != window_batches(lengths, 8, 4, 17)
    assert {index for batch in window_batches([5, 5, 5], 8, 0, 0) for index in batch} == {0, 1, 2}
    assert len({step_seed(seed, step) for seed in range(40) for step in range(40)}) == 1600


def test_a_later_start_gives_the_same_batches(prepared):
    whole = iter(StepBatches(prepared, 4, seed=5))
    batches = [next(whole) for _ in range(6)]
    later = iter(StepBatches(prepared, 4, seed=5, start=4))
    assert all(same(one, next(later)) for one in batches[4:])
    assert len({batch.seed for batch in batches}) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_keeps_the_order_for_any_number_of_workers(prepared, workers):
    batches = StepBatches(prepared, 4, seed=5, start=2)
    loaded = iter(batches.loader(workers))
    assert all(same(next(loaded), batches.batch(step)) for step in range(2, 6))


def test_held_batches_hold_every_sample_once_in_order(prepared):
    held = list(held_batches(prepared, 4))
    assert [len(batch.ids) for batch in held] == [4, 4, 2]
    assert all(same(one, two) for one, two in zip(held, held_batches(prepared, 4), strict=True))


def test_frozen_work_is_done_once_and_then_only_read(bridge, data, prepared, tmp_path, monkeypatch):
    first = prepare_all(bridge, data, FeatureStore(tmp_path / "cache"), progress=False)

    def refuse(*_):
        raise AssertionError("frozen work was done again")

    monkeypatch.setattr(bridge.inputs["image"].encoder, "forward", refuse)
    monkeypatch.setattr(bridge.outputs["image"].decoder, "encode", refuse)
    store = FeatureStore(tmp_path / "cache")
    again = prepare_all(bridge, data, store, progress=False)
    assert not store.computed
    for one, two, three in zip(held_batches(first, 4), held_batches(again, 4), held_batches(prepared, 4), strict=True):
        assert same(one, two)
        assert same(one, three)


def test_progress_is_shown_unless_unwanted(bridge, data, capsys):
    prepare_all(bridge, data, FeatureStore(None), label="my scans")
    assert "encoding my scans:   0%|          | 0/10" in capsys.readouterr().err
    prepare_all(bridge, data, FeatureStore(None), progress=False)
    assert capsys.readouterr().err == ""


def lines(tmp_path, *dialogues):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"messages": messages}) for messages in dialogues))
    return JsonlData(path)


def ask(text, *reply):
    return [{"role": "user", "content": text}, *({"role": "assistant", "content": part} for part in reply)]


@pytest.mark.parametrize(
    ("dialogue", "words"),
    [
        (ask("word " * 400, "yes"), "positions but the backbone's context holds 512"),
        (ask("Hello?"), "the assistant says nothing"),
        (ask("Draw.", [{"type": "image", "path": "a.png"}]), "has no 'caption'"),
        (ask("Sing.", [{"type": "audio", "path": "a.png", "caption": "la"}]), "can't make media of type 'audio'"),
    ],
)
def test_dialogues_that_cannot_train_are_named(bridge, tmp_path, dialogue, words):
    (tmp_path / "a.png").write_bytes(b"no picture")
    data = lines(tmp_path, ask("Hi", "Hello"), ask("Hi", "Hello"), dialogue)
    with pytest.raises(DataError) as error:
        prepare_all(bridge, data, FeatureStore(None), progress=False)
    assert f"{tmp_path / 'data.jsonl'}:3: " in str(error.value)
    assert words in str(error.value)


def test_a_damaged_picture_is_named(bridge, tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    data = lines(tmp_path, ask([{"type": "image", "path": "a.png"}], "It is red."))
    with pytest.raises(DataError, match=r"data\.jsonl:1: .*a\.png.* damaged"):
        prepare_all(bridge, data, FeatureStore(None), progress=False)


def test_large_data_is_read_again_from_the_store(bridge, data, prepared, monkeypatch):
    import mmbridge.data.loader as loader

    monkeypatch.setattr(loader, "_KEPT", 5)
    lean = prepare_all(bridge, data, FeatureStore(None), progress=False)
    assert all(same(one, two) for one, two in zip(held_batches(lean, 4), held_batches(prepared, 4), strict=True))
