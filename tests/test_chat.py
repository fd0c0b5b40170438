"""A chat says what a fresh pass over the whole dialogue would say, and reads and encodes only what is new."""

import logging
from collections import Counter

import pytest
import tiny
import torch
from test_generation import DIALOGUES, Probe, ask, assert_equal, build, give_trigger, picture

from mmbridge import Bridge, Chat
from mmbridge.data.features import FeatureStore
from mmbridge.errors import ConfigError, ContextError, MediaError, MessageError
from mmbridge.generation import Decoding
from mmbridge.media import Image
from mmbridge.messages import read_messages
from mmbridge.replies import MediumDone, MediumPreview, MediumStarted, Notice, ReplyDone, TextDelta

TURNS = [
    "Draw a red one.",
    [picture(0), {"type": "text", "text": "What colour is it?"}],
    "What is it?",
    [{"type": "text", "text": "Draw it."}, picture(1)],
]


@pytest.fixture
def bridge(parts):
    """A bridge whose model emits the trigger after its third word, and now and then later."""
    bridge = build(parts)
    give_trigger(bridge, DIALOGUES[0], 3)
    return bridge


def roomy(bridge):
    """Positions are rotary, so that a longer context is a matter of the configuration."""
    bridge.backbone.model.config.max_position_embeddings = 1024
    return bridge


def watch(module):
    """Count the rows or positions (dimension 1 of the output) that a module reads."""
    read = []
    module.register_forward_hook(lambda module, arguments, output: read.append(tuple(output.shape[:2])))
    return read


def check_turns(bridge, turns, chat=None, start=0, **sampling):
    chat = chat or Chat(bridge, **sampling)
    media = 0
    for number, content in enumerate(turns, start):
        whole = [*chat.messages, {"role": "user", "content": content}]
        wanted = bridge.generate(whole, seed=number, **sampling)
        reply = chat.send(content)
        assert_equal(reply, wanted.parts)
        assert reply.complete == wanted.complete
        assert chat.messages == [*whole, reply.message]
        media += len(reply.media)
    return media


@pytest.mark.parametrize("attention", ["causal", "full"])
def test_turns_are_answered_as_whole_dialogues(bridge, attention):
    bridge.inputs["image"].attention = attention
    assert check_turns(roomy(bridge), TURNS, max_new_tokens=5) > 0


def test_media_that_were_committed_are_read_anew_as_the_whole_dialogue_has_them(parts):
    torch.manual_seed(0)
    built = roomy(build(parts))
    bridge = Bridge(built.backbone, dict(built.inputs), {"image": Probe(1)}).eval()
    give_trigger(bridge, DIALOGUES[0], 2)
    assert check_turns(bridge, TURNS[:3], max_new_tokens=4) > 0


def test_sampled_turns_are_those_of_whole_dialogues(bridge):
    check_turns(roomy(bridge), TURNS[1:3], max_new_tokens=5, temperature=1.3, top_p=0.9)


@torch.no_grad()
def test_a_longer_dialogue_is_read_from_where_it_differs(bridge):
    said = {"role": "assistant", "content": [{"type": "text", "text": "It is red."}, {"type": "image", "caption": "x"}]}
    dialogue = [*ask("What is it?", picture(0)), said, *ask("Draw it.", picture(1))]
    other = [dialogue[0], {"role": "assistant", "content": "It is blue."}, *dialogue[2:]]
    store = FeatureStore()  # features are told apart by identity
    first, whole, changed = bridge.prepare([dialogue[:1], dialogue, other], reply=True, store=store)
    shared = next(at for at, (one, two) in enumerate(zip(whole.ids, changed.ids, strict=False)) if one != two)
    decoding = Decoding(bridge)
    assert decoding.prefill([first]) == len(first.ids)
    assert decoding.prefill([whole]) == len(whole.ids) - len(first.ids)
    fresh = Decoding(bridge)
    fresh.prefill([whole])
    torch.testing.assert_close(decoding.hidden, fresh.hidden, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bridge.logits(decoding.hidden), bridge.logits(fresh.hidden), atol=1e-4, rtol=1e-4)
    assert decoding.prefill([whole]) == 1, "only the last position, for its hidden state"
    torch.testing.assert_close(decoding.hidden, fresh.hidden, atol=1e-4, rtol=1e-4)
    assert decoding.prefill([changed]) == len(changed.ids) - shared
    fresh.prefill([changed])
    torch.testing.assert_close(decoding.hidden, fresh.hidden, atol=1e-4, rtol=1e-4)


def test_the_shipped_bridge_reads_only_new_positions_and_encodes_media_once():
    bridge = Bridge.from_pretrained("mmbridge/tiny")
    chat = Chat(bridge, max_new_tokens=24)
    star = Image(torch.full((3, 32, 32), 200, dtype=torch.uint8))
    positions, encoded = watch(bridge.backbone), watch(bridge.inputs["image"].encoder)
    lengths = []
    for text in ("What colour is it?", "What do you see?", "Is it red?", "Thank you!"):
        positions.clear()
        content = [{"type": "image", "data": star}, {"type": "text", "text": text}]
        chat.send(content)
        lengths.append((positions[0][1], len(bridge.prepare([chat.messages[:-1]], reply=True)[0].ids)))
        encoded.pop()  # the line above encodes all
    assert sum(rows for rows, _ in encoded) == 1
    assert chat.store.computed == Counter(image=1)
    assert all(read < 30 for read, _ in lengths) and lengths[-1][1] > 80, lengths


def test_events_tell_the_reply_in_order(bridge):
    kinds = Counter()
    for dialogue, temperature in [*((dialogue, 0.0) for dialogue in DIALOGUES), (DIALOGUES[0], 1.0)]:
        options = {"max_new_tokens": 12, "temperature": temperature}
        wanted = bridge.generate(dialogue, **options)
        events = list(bridge.stream(dialogue, **options))
        *others, last = events
        assert isinstance(last, ReplyDone)
        assert_equal(last.reply, wanted.parts)
        assert "".join(event.text for event in events if isinstance(event, TextDelta)) == wanted.text
        media = [event for event in others if not isinstance(event, TextDelta)]
        assert [type(event) for event in media] == [MediumStarted, MediumDone] * len(wanted.media)
        assert [event.index for event in media[::2]] == list(range(len(wanted.media)))
        assert [event.medium for event in media[1::2]] == last.reply.media
        kinds.update(type(event).__name__ for event in others)
    assert kinds["TextDelta"] > 8 and kinds["MediumDone"] > 0


def test_previews_show_a_picture_in_the_making(bridge):
    bridge.outputs["image"].decoder._steps = 5
    options = {"max_new_tokens": 4}
    wanted = bridge.generate(DIALOGUES[0], **options)
    events = list(bridge.stream(DIALOGUES[0], preview_every=2, **options))
    assert_equal(events[-1].reply, wanted.parts)
    media = [event for event in events if not isinstance(event, TextDelta | ReplyDone)]
    assert [type(event) for event in media] == [MediumStarted, MediumPreview, MediumPreview, MediumDone]
    assert [(event.step, event.steps) for event in media[1:3]] == [(2, 5), (4, 5)]
    shown = [event.medium.pixels.float() for event in media[1:]]
    assert shown[0].shape == shown[2].shape
    assert (shown[1] - shown[2]).abs().mean() < (shown[0] - shown[2]).abs().mean()


def test_a_preview_is_a_place_to_leave_and_an_error_while_painting_is_told(bridge):
    chat = Chat(roomy(bridge), max_new_tokens=4, preview_every=1)
    events = chat.stream(TURNS[0])
    assert any(isinstance(event, MediumPreview) for event in events)
    events.close()
    assert chat.messages == []
    with torch.no_grad():
        weights = bridge.outputs["image"].projection.state_dict()
        name = next(iter(weights))
        kept = weights[name].clone()
        weights[name].fill_(float("nan"))
        with pytest.raises(MediaError, match="NaN"):
            chat.send(TURNS[0])
        weights[name].copy_(kept)
    assert check_turns(bridge, TURNS[:2], chat, max_new_tokens=4) > 0


def test_text_comes_while_it_is_written(bridge):
    seen = watch(bridge.backbone)
    told = [len(seen) for event in bridge.stream(DIALOGUES[1], max_new_tokens=8) if isinstance(event, TextDelta)]
    assert len(set(told)) >= 4


def test_a_turn_that_is_left_or_fails_is_taken_back(bridge):
    chat = Chat(roomy(bridge), max_new_tokens=6)
    chat.send(TURNS[1])
    before = list(chat.messages)
    for _ in chat.stream("What is it? Draw it."):
        break
    assert chat.messages == before
    check_turns(bridge, TURNS[2:3], chat, start=1, max_new_tokens=6)

    before = list(chat.messages)
    calls = []

    def interrupt(module, arguments):
        calls.append(module)
        if len(calls) == 4:
            raise KeyboardInterrupt

    hook = bridge.backbone.model.base_model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        chat.send("Describe the picture.")
    hook.remove()
    assert chat.messages == before
    check_turns(bridge, TURNS[:1], chat, start=2, max_new_tokens=6)
    chat.clear()
    assert chat.messages == []
    check_turns(bridge, TURNS[:1], chat, max_new_tokens=6)


def test_a_dialogue_that_outgrows_the_context_forgets_media_then_turns_and_says_so(bridge, caplog, monkeypatch):
    monkeypatch.setattr(bridge.backbone.model.config, "max_position_embeddings", 128)
    chat = Chat(bridge, max_new_tokens=4, system="Be brief.")
    notices = []
    with caplog.at_level(logging.WARNING, "mmbridge.chat"):
        for number in range(12):
            events = list(chat.stream([picture(number), {"type": "text", "text": "What is it?"}]))
            assert isinstance(events[-1], ReplyDone)
            notices += [event.text for event in events if isinstance(event, Notice)]
    assert notices == caplog.messages
    assert (
        "the context of 128 positions is full: " in notices[0] and "oldest media are no longer in memory" in notices[0]
    )
    assert "turns" not in notices[0] and any("oldest turns" in notice for notice in notices)
    assert len(notices) < 12, "some room is made for the turns to come"
    assert len(chat.messages) == 25


NOTE = {"type": "text", "text": "[image no longer in memory]"}


@pytest.mark.parametrize("context, slots, count, note", [(128, 4, 6, []), (256, 64, 3, [NOTE])])
def test_what_is_left_after_forgetting_is_answered_like_a_dialogue_of_its_own(parts, context, slots, count, note):
    config = tiny.bridge_config(parts)
    if slots != 4:
        projection = {"name": "resampler", "num_tokens": slots, "dim_hidden": 16, "depth": 1, "num_heads": 2}
        config["inputs"]["image"]["projection"] = projection
    bridge = Bridge.from_config(config).eval()
    bridge.backbone.model.config.max_position_embeddings = context
    chat = Chat(bridge, max_new_tokens=4)
    pictures = [picture(number) for number in range(count)]
    text = {"type": "text", "text": "What is it?"}
    chat.send([*pictures, text])
    asked, said = chat.messages

    def length(dialogue):
        return len(bridge.prepare([dialogue], reply=True)[0].ids)

    room, spare = 4 + 3, context // 8
    following = "Is it"
    while length([asked, said, *ask(following)]) <= context - room:
        following += " it"
    kept, lost = list(pictures), 0
    while kept and length([asked, said, *ask(following)]) > context - room - spare:
        kept, lost = kept[1:], lost + 1
        asked = {"role": "user", "content": [*note * lost, *kept, text]}
    assert 0 < lost < len(pictures)
    notice, *_, last = chat.stream(following)
    assert notice == Notice(f"the context of {context} positions is full: {lost} oldest media are no longer in memory.")
    assert_equal(last.reply, bridge.generate([asked, said, *ask(following)], max_new_tokens=4, seed=1).parts)


def test_what_cannot_be_sent_is_one_error_and_the_chat_goes_on(bridge, tmp_path):
    chat = Chat(bridge, root=tmp_path, max_new_tokens=3)
    chat.send("What is it?")
    before = list(chat.messages)
    wrong = [
        ([{"type": "image", "path": "none.png"}], MediaError, "there is no file 'none.png'"),
        ([{"type": "image", "path": "../x.png"}], MediaError, "leads out of the data root"),
        ([{"type": "image"}], MessageError, "neither 'path' nor 'data'"),
        ([{"type": "image", "caption": "x"}], MessageError, "has no 'path' or 'data'; give the file"),
        ([{"type": "medium", "index": 3}], MessageError, "unknown type 'medium'"),
        ([{"type": "audio", "path": "x.wav"}], MessageError, "this bridge can't read media of type 'audio'"),
        ("What is it? " * 200, ContextError, "shorten the dialogue"),
    ]
    for content, error, words in wrong:
        with pytest.raises(error, match=words):
            chat.send(content)
        with pytest.raises(error, match=words):
            chat.stream(content)
    assert chat.messages == before
    check_turns(bridge, ["What is it?"], chat, start=1, max_new_tokens=3)
    with pytest.raises(ConfigError, match="max_new_tokens at least 1"):
        Chat(bridge, max_new_tokens=0)


def test_files_may_change_or_go_after_they_were_sent(bridge, tmp_path):
    picture(0)["data"].save(tmp_path / "a.png")
    chat = Chat(roomy(bridge), root=tmp_path, max_new_tokens=4)
    chat.send([{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is it?"}])
    said = chat.messages[1]
    (tmp_path / "a.png").unlink()
    dialogue = [*ask("What is it?", picture(0)), said, *ask("Is it red?")]
    assert_equal(chat.send("Is it red?"), bridge.generate(dialogue, seed=1, max_new_tokens=4).parts)


def test_saved_dialogues_are_read_by_generate(bridge, tmp_path):
    picture(0)["data"].save(tmp_path / "a.png")
    chat = Chat(roomy(bridge), root=tmp_path, max_new_tokens=5)
    chat.send(TURNS[0])
    chat.send([{"type": "image", "path": "a.png"}, picture(1), {"type": "text", "text": "What is it?"}])
    file = chat.save(tmp_path / "saved")
    assert file == tmp_path / "saved" / "dialogue.json"
    messages = read_messages(file)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[0] == chat.messages[0]
    paths = [part["path"] for message in messages[1:] for part in message["content"] if part["type"] == "image"]
    assert len(paths) >= 3 and sorted(file.name for file in file.parent.iterdir()) == sorted(["dialogue.json", *paths])
    wanted = chat.send("What colour is it?")
    again = bridge.generate([*messages, *ask("What colour is it?")], root=file.parent, max_new_tokens=5, seed=2)
    assert_equal(again, wanted.parts)
