"""Sequences: where media stand, what is supervised, how rows are padded, who sees whom."""

import pytest
import tiny
import torch

from mmbridge.bridge import Bridge
from mmbridge.errors import MessageError
from mmbridge.media import Image
from mmbridge.sequence import IGNORED, MediumSpan, attention_of, collate, positions_of

PICTURE = {"type": "image", "data": Image(torch.full((3, 16, 16), 90, dtype=torch.uint8))}
MADE = {"type": "image", "caption": "a red one"}


@pytest.fixture(scope="module")
def bridge(parts):
    torch.manual_seed(0)
    return Bridge.from_config(tiny.bridge_config(parts)).eval()


def text(value):
    return {"type": "text", "text": value}


def say(role, *content):
    return {"role": role, "content": list(content)}


QUESTION = say("user", PICTURE, text("What colour is it?"))
DIALOGUES = {
    "words": [QUESTION, say("assistant", text("It is red."))],
    "words, then a picture": [say("user", text("Draw a red one.")), say("assistant", text("It is red."), MADE)],
    "a picture alone": [say("user", text("Draw a red one.")), say("assistant", MADE)],
    "a picture, then words": [say("user", text("Draw a red one.")), say("assistant", MADE, text("It is red."))],
    "words between pictures": [QUESTION, say("assistant", MADE, text(" It is red. "), MADE)],
    "a second turn": [QUESTION, say("assistant", MADE), QUESTION, say("assistant", MADE, text("It is red."))],
    "a system's word": [say("system", text("Be brief.")), QUESTION, say("assistant", text("It is red."), MADE)],
}


@pytest.mark.parametrize("template", ["plain", "vicuna"])
@pytest.mark.parametrize("name", DIALOGUES)
def test_what_is_learned_starts_where_generation_starts(bridge, name, template, monkeypatch):
    """The prompt for a reply is a prefix of the training sequence, and the first id to learn follows it."""
    monkeypatch.setattr(bridge.backbone, "_template", template)
    dialogue = DIALOGUES[name]
    (prompt,) = bridge.prepare([dialogue[:-1]], reply=True)
    (trained,) = bridge.prepare([dialogue])
    start = len(prompt.ids)
    assert trained.ids[:start] == prompt.ids
    before, (whole,) = bridge.prepare([dialogue[:-1]]), bridge.prepare([dialogue])
    assert trained.labels[start] == trained.ids[start]
    assert trained.labels[len(before[0].ids) : start] == [IGNORED] * (start - len(before[0].ids))
    assert whole.labels[-1] in (bridge.backbone.eos, IGNORED)  # the plain template ends a turn by a line break


def test_supervised_are_the_assistants_words_its_trigger_and_the_end(bridge):
    (sequence,) = bridge.prepare([DIALOGUES["words, then a picture"]])
    learned = [label for label in sequence.labels if label != IGNORED]
    first = bridge.first_ids["image"]
    assert learned[-2:] == [first, bridge.backbone.eos]
    assert bridge.backbone.tokenizer.decode(learned[:-2]).strip() == "It is red."
    (span,) = sequence.leaving
    assert sequence.ids[span.start : span.start + span.length] == [first, first + 1, first + 2]


def test_media_that_come_in_take_as_many_places_as_their_projection_gives(bridge):
    (sequence,) = bridge.prepare([DIALOGUES["a second turn"]])
    assert [span.length for span in sequence.entering] == [4, 4]
    for span in sequence.entering:
        assert set(sequence.labels[span.start : span.start + span.length]) == {IGNORED}
        assert span.content.shape == (4, 12)


def test_a_users_own_control_tokens_do_not_control(bridge):
    (sequence,) = bridge.prepare([[say("user", text("</s><s>")), say("assistant", text("It is red."))]])
    assert sequence.ids.count(bridge.backbone.eos) == 1


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (say("user", {"type": "audio", "path": "a.wav"}), "can't read media of type 'audio'; it can read: image"),
        (say("assistant", {"type": "video", "path": "a.mp4"}), "can't make media of type 'video'; it can make: image"),
        (say("user", {"type": "image", "caption": "red"}), "has no 'path' or 'data'"),
    ],
)
def test_media_without_a_way_are_refused(bridge, message, words):
    with pytest.raises(MessageError, match=words):
        bridge.prepare([[message]])


@pytest.mark.parametrize("left", [False, True])
def test_rows_side_by_side_keep_their_content(bridge, left):
    sequences = bridge.prepare(list(DIALOGUES.values()))
    batch = collate(sequences, left=left, seed=3)
    assert batch.seed == 3
    for row, sequence in enumerate(sequences):
        assert batch.ids[row][batch.mask[row]].tolist() == sequence.ids
        assert bool(batch.mask[row, -1 if left else 0])
        assert positions_of(batch.mask)[row][batch.mask[row]].tolist() == list(range(len(sequence.ids)))
        spans = [span for span in batch.entering.get("image", []) if span.row == row]
        shift = batch.ids.shape[1] - len(sequence.ids) if left else 0
        assert [span.start - shift for span in spans] == [span.start for span in sequence.entering]
    flat = batch.ids.flatten()
    assert torch.equal(flat[batch.predicting + 1], batch.answers)
    assert len(batch.answers) == sum(label != IGNORED for sequence in sequences for label in sequence.labels)


def test_full_attention_is_inside_a_medium_and_nowhere_else():
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    allowed = attention_of(mask, [MediumSpan("image", 1, 3, None, row=0)])[:, 0]
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    wanted = causal.clone()
    wanted[1:4, 1:4] = True
    assert torch.equal(allowed[0], wanted)
    assert torch.equal(allowed[1, :4, :4], causal[:4, :4])
    assert not allowed[1, :4, 4:].any()
    assert allowed.any(-1).all()
    assert torch.equal(attention_of(mask, []), mask.long())
