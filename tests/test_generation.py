"""The loop: what it decodes is what a full pass would, alone or in a batch, with media between the words."""

import re

import pytest
import tiny
import torch
from torch import nn

from mmbridge.backbones import NewRows
from mmbridge.bridge import Bridge
from mmbridge.errors import ConfigError, ContextError, MessageError
from mmbridge.media import Image
from mmbridge.replies import Reply, TextDelta
from mmbridge.sequence import attention_of, collate, positions_of


def picture(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"type": "image", "data": Image(torch.randint(0, 256, (3, 16, 16), generator=generator, dtype=torch.uint8))}


def ask(text, *media):
    return [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]


DIALOGUES = [
    ask("Draw a red one."),
    ask("What colour is it?", picture(0)),
    ask("What is it? What colour is it? Describe the picture.", picture(1), picture(2)),
]


def build(parts, **output):
    torch.manual_seed(0)
    return Bridge.from_config(tiny.bridge_config(parts, output=output)).eval()


@pytest.fixture
def bridge(parts):
    """A bridge whose model emits the trigger after its third word, and now and then later."""
    bridge = build(parts)
    give_trigger(bridge, DIALOGUES[0], 3)
    return bridge


def give_trigger(bridge, dialogue, after):
    """Set the trigger's head so that it wins where a reply to ``dialogue`` has ``after`` tokens."""
    ids = greedy(bridge, dialogue, after)[0]
    with torch.no_grad():
        hidden = states(bridge, dialogue, ids)[0, -1]
        best = float(bridge.backbone.logits(hidden).max())
        bridge.outputs["image"].rows.head[0] = hidden / hidden.square().sum() * (best + 0.05)


@torch.no_grad()
def states(bridge, dialogue, reply):
    """Hidden states of prompt and reply in one pass, without a cache."""
    batch = collate(bridge.prepare([dialogue], reply=True))
    batch.ids = torch.cat([batch.ids, torch.tensor([reply], dtype=torch.long)], dim=1)
    return bridge.backbone(bridge.embed(batch), torch.ones_like(batch.ids))


@torch.no_grad()
def greedy(bridge, dialogue, count):
    """The reference: a whole pass for every token; returns ids and, for each picture, the block's hidden states."""
    ids, blocks = [], []
    first = bridge.first_ids["image"]
    for _ in range(count):
        token = bridge.token_of(int(bridge.logits(states(bridge, dialogue, ids)[0, -1]).argmax()))
        if token == bridge.backbone.eos:
            break
        if token != first:
            ids.append(token)
            continue
        block = list(range(first, first + bridge.outputs["image"].rows.count))
        ids += block
        blocks.append(states(bridge, dialogue, ids)[:, -len(block) :])
    return ids, blocks


def reference(bridge, dialogue, count, seed):
    """The reply of the reference, as a list of strings and pictures."""
    ids, blocks = greedy(bridge, dialogue, count)
    first, parts, words = bridge.first_ids["image"], [], []
    way = bridge.outputs["image"]
    remaining = iter(blocks)
    for token in [*ids, first]:
        if token < first:
            words.append(token)
        elif token == first:
            text = bridge.backbone.tokenizer.decode(words, skip_special_tokens=True).strip()
            parts += [text] if text else []
            words = []
            hidden = next(remaining, None)
            if hidden is not None:
                embeddings = bridge.embed_ids(torch.arange(first, first + way.rows.count))[None]
                parts += way.decoder.sample(way.condition(hidden, embeddings), seed=[seed])
    return parts


def assert_alike(first, second):
    """Sampling steps multiply what the last bit of a hidden state makes of a pixel, but not to more than a shade."""
    difference = (first.pixels.float() - second.pixels.float()).abs()
    assert difference.mean() < 0.5
    assert difference.max() <= 4


def assert_equal(reply, parts):
    assert [type(part) for part in reply.parts] == [type(part) for part in parts]
    for ours, theirs in zip(reply.parts, parts, strict=True):
        if isinstance(ours, str):
            assert ours == theirs
        else:
            assert_alike(ours, theirs)


def test_cached_decoding_gives_what_whole_passes_give(bridge):
    reply = bridge.generate(DIALOGUES[0], max_new_tokens=8)
    assert [type(part) for part in reply.parts[:2]] == [str, Image]
    assert_equal(reply, reference(bridge, DIALOGUES[0], 8, seed=0))


def test_rows_of_a_batch_answer_as_they_would_alone(bridge):
    replies = bridge.generate(DIALOGUES, max_new_tokens=8)
    for row, (dialogue, reply) in enumerate(zip(DIALOGUES, replies, strict=True)):
        assert_equal(reply, reference(bridge, dialogue, 8, seed=row))
    assert any(reply.media for reply in replies)
    assert len({tuple(type(part) for part in reply.parts) for reply in replies}) > 1  # rows are in different phases


def test_appended_signals_are_decoded_like_emitted_ones(parts):
    bridge = build(parts, mode="appended")
    give_trigger(bridge, DIALOGUES[0], 2)
    assert bridge.outputs["image"].rows.count == 4
    reply = bridge.generate(DIALOGUES[0], max_new_tokens=6)
    assert reply.media
    assert_equal(reply, reference(bridge, DIALOGUES[0], 6, seed=0))


def test_a_picture_in_a_reply_continues_as_in_training(bridge):
    """The states that steer the decoder are those that the alignment loss read."""
    reply = bridge.generate(DIALOGUES[0], max_new_tokens=4)
    assert [type(part) for part in reply.parts] == [str, Image]
    way = bridge.outputs["image"]
    said = [{"type": "text", "text": reply.text}, {"type": "image", "caption": "red"}]
    batch = collate(bridge.prepare([[*DIALOGUES[0], {"role": "assistant", "content": said}]]))
    (span,) = batch.leaving["image"]
    with torch.no_grad():
        embeddings = bridge.embed(batch)
        hidden = bridge.backbone(embeddings, attention_of(batch.mask, []))
    place = slice(span.start, span.start + span.length)
    (again,) = way.decoder.sample(way.condition(hidden[:, place], embeddings[:, place]), seed=[0])
    assert_alike(again, reply.media[0])


def test_sampling_is_seeded_and_narrows_to_greedy(bridge):
    options = {"temperature": 1.5, "max_new_tokens": 6}
    one, two, other = (bridge.generate(DIALOGUES[1], seed=seed, **options).text for seed in (1, 1, 2))
    assert one == two != other
    narrow = bridge.generate(DIALOGUES[1], temperature=1.0, top_p=1e-6, max_new_tokens=6, seed=3)
    assert narrow.text == bridge.generate(DIALOGUES[1], max_new_tokens=6).text


def test_sampled_rows_do_not_depend_on_their_neighbours(bridge):
    options = {"temperature": 1.2, "max_new_tokens": 6, "seed": 4}
    alone = bridge.generate(DIALOGUES[0], **options)
    together = bridge.generate([DIALOGUES[0], DIALOGUES[2]], **options)
    assert alone.text == together[0].text


def test_replies_end_at_the_end_token_or_are_marked_incomplete(bridge):
    assert not bridge.generate(DIALOGUES[1], max_new_tokens=2).complete
    with torch.no_grad():
        weight = bridge.backbone.model.get_output_embeddings().weight
        hidden = states(bridge, DIALOGUES[1], [])[0, -1]
        weight[bridge.backbone.eos] = 50 * hidden
    reply = bridge.generate(DIALOGUES[1], max_new_tokens=2)
    assert reply.complete
    assert reply.parts == []


def test_replies_stop_at_the_end_of_the_context(bridge):
    long = ask("What is it? " * 20)
    length = len(bridge.prepare([long], reply=True)[0].ids)
    assert length < bridge.backbone.context - 3
    reply = bridge.generate(long, max_new_tokens=500)
    assert not reply.complete


def test_prompts_that_leave_no_room_are_refused(bridge):
    with pytest.raises(ContextError, match="leaves no room for a reply; shorten the dialogue"):
        bridge.generate(ask("What is it? " * 200))


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}])
def test_options_out_of_range_are_refused(bridge, options):
    with pytest.raises(ConfigError, match="temperature must be at least 0"):
        bridge.generate(DIALOGUES[0], **options)


def test_modes_are_as_they_were_afterwards_also_after_an_error(bridge):
    bridge.eval()
    bridge.inputs["image"].projection.train()
    modes = [module.training for module in bridge.modules()]
    bridge.generate(DIALOGUES[1], max_new_tokens=1)
    assert [module.training for module in bridge.modules()] == modes
    with pytest.raises(MessageError):
        bridge.generate([{"role": "nobody", "content": "x"}])
    assert [module.training for module in bridge.modules()] == modes


def test_replies_are_written_with_their_media(bridge, tmp_path):
    reply = bridge.generate(DIALOGUES[0], max_new_tokens=4)
    message = reply.save(tmp_path / "out")
    assert [part["type"] for part in message["content"]] == ["text", "image"]
    kept = Image.load(message["content"][1]["path"], root=tmp_path / "out")
    assert torch.equal(kept.pixels, reply.media[0].pixels)
    assert reply.message["content"][1]["data"] is reply.media[0]
    bridge.generate([*DIALOGUES[0], reply.message, *ask("What colour is it?")], max_new_tokens=1)
    assert Reply(["a", reply.media[0], "b"]).text == "a b"


class Probe(nn.Module):
    """A way out that uses the verbs of the siblings to come: sampled ids, states seen both ways, kept or forgotten."""

    attention = "full"

    def __init__(self, peeks):
        super().__init__()
        self.peeks, self.seen = peeks, []

    def build(self, modality, backbone):
        self.rows = NewRows(backbone.embedding, 4, emitted=4)
        with torch.no_grad():
            self.rows.head[1:] = self.rows.embedding[1:]

    def ids(self, target):
        return [0, 1, 2, 3]

    def trainable(self):
        return {"rows": self.rows}

    def render(self, span, seeds, first):
        ids = span.sample([first + 1, first + 3], 2)
        embeddings = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(7)).expand(span.rows, -1, -1)
        peeked = [span.peek(embeddings * (number + 1)) for number in range(self.peeks)]
        self.seen.append((ids, embeddings, peeked, span.commit(embeddings)))
        return [Image(torch.zeros(3, 4, 4, dtype=torch.uint8)) for _ in seeds]


def probed(parts, peeks):
    bridge = build(parts)
    probe = Probe(peeks)
    torch.manual_seed(0)
    bridge = Bridge(bridge.backbone, dict(bridge.inputs), {"image": probe}).eval()
    give_trigger(bridge, DIALOGUES[0], 2)
    return bridge, probe


def test_sampled_ids_are_allowed_ones_and_peeks_leave_no_trace(parts):
    replies = []
    for peeks in (0, 2):
        bridge, probe = probed(parts, peeks)
        replies.append(bridge.generate([DIALOGUES[0], DIALOGUES[2]], max_new_tokens=6))
        ids, _, peeked, committed = probe.seen[0]
        assert set(ids.flatten().tolist()) <= {bridge.first_ids["image"] + 1, bridge.first_ids["image"] + 3}
        if peeked:
            torch.testing.assert_close(peeked[0], committed)
            assert not torch.allclose(peeked[1], committed)
    assert [reply.text for reply in replies[0]] == [reply.text for reply in replies[1]]


@torch.no_grad()
def test_committed_states_see_each_other_and_all_before(parts):
    bridge, probe = probed(parts, 0)
    reply = bridge.generate(DIALOGUES[0], max_new_tokens=3)
    ids, embeddings, _, committed = probe.seen[0]
    words = bridge.backbone.tokenizer(reply.parts[0], add_special_tokens=False)
    said = greedy(bridge, DIALOGUES[0], 2)[0]
    assert len(said) == 2, words
    batch = collate(bridge.prepare([DIALOGUES[0]], reply=True))
    batch.ids = torch.cat([batch.ids, torch.tensor([[*said, bridge.first_ids["image"], *ids[0].tolist()]])], dim=1)
    whole = torch.cat([bridge.embed(batch), embeddings], dim=1)
    length = whole.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    allowed[-3:, -3:] = True
    hidden = bridge.backbone(whole, allowed[None, None], positions_of(torch.ones(1, length, dtype=torch.bool)))
    torch.testing.assert_close(committed, hidden[:, -3:], atol=1e-5, rtol=1e-4)


def test_the_stop_of_the_backbone_ends_a_reply_streamed_or_not_and_in_a_batch(bridge):
    whole = bridge.generate(DIALOGUES[0], max_new_tokens=24)
    assert not whole.complete
    words = whole.parts[-1]
    stop = re.findall("[!-~]{3}", words)[-1]
    bridge.backbone.stop = stop
    alone = bridge.generate(DIALOGUES[0], max_new_tokens=24)
    assert alone.complete
    assert alone.parts[-1] == words.partition(stop)[0].strip()
    assert len(alone.parts) == len(whole.parts)
    assert bridge.generate(DIALOGUES[:2], max_new_tokens=24)[0].text == alone.text
    events = bridge.stream(DIALOGUES[0], max_new_tokens=24)
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == alone.text
