"""Dialogues: every reply is right given the turns before it, in every kind, for what can be made."""

import hashlib
import re

import numpy as np
import pytest

from mmbridge.errors import ConfigError
from mmbridge.synthetic import (
    CARRIES,
    Dialogues,
    Scene,
    convert_request,
    describe_request,
    make_request,
    parse,
    question,
)
from mmbridge.synthetic.dialogues import LONGEST, MIX
from mmbridge.synthetic.requests import INPUTS, MEDIA, PAIRS


def dialogues(kind, count=120, **options):
    rng = np.random.default_rng(0)
    source = Dialogues(lambda rng, source: (Scene.random(rng, "seen", source), 3), {kind: 1.0}, **options)
    return [source.compose(rng) for _ in range(count)]


def follow(exchanges):
    """Yield each exchange with all that its dialogue has said by then, the latest word on a factor last."""
    known: dict[str, str] = {}
    for exchange in exchanges:
        for shown in exchange.shown:
            if len(exchange.shown) == 1:
                known = {}
            known |= shown.scene.factors(shown.modality)
        if not exchange.asked.startswith("Is it"):
            known |= parse(exchange.asked)
        yield exchange, known


@pytest.mark.parametrize("kind", ["draw", "convert", "edit", "pair", "several"])
def test_media_show_all_that_is_known_and_that_they_can_show(kind):
    made = 0
    for exchanges in dialogues(kind, outputs=MEDIA, turns=0.4, split="seen"):
        for exchange, known in follow(exchanges):
            for medium, words in exchange.made:
                assert parse(words) == {name: known[name] for name in CARRIES[medium] if name in known}, exchange
                assert parse(exchange.answer).items() >= parse(words).items()
                assert exchange.answer.startswith("Here is ")
                made += 1
            if exchange.asked[:3] != "Is " and not exchange.made:
                assert parse(exchange.answer).items() <= known.items()
    assert made > 60


@pytest.mark.parametrize("kind", ["describe", "question", "convert", "edit", "pair", "refuse"])
def test_everything_that_comes_in_is_of_its_own_split(kind):
    shown = set()
    for exchanges in dialogues(kind, 150, inputs=INPUTS, outputs=("image", "video"), turns=0.4, split="seen"):
        for exchange, known in follow(exchanges):
            shown |= {one.modality for one in exchange.shown}
            assert all(one.scene.split_for(one.modality) == "seen" for one in exchange.shown)
            if kind in ("describe", "convert"):
                assert parse(exchange.answer).items() <= known.items()
    assert shown == set(INPUTS)


def test_dialogues_about_pictures_videos_and_sounds_are_as_they_always_were():
    """The shipped parts were trained on them; the digest is that of the world before it had other media."""
    text = ""
    for kind in MIX:
        for exchanges in dialogues(kind, 60, outputs=MEDIA, turns=0.4, split="seen"):
            text += "".join(f"{one.asked}|{one.answer}|{one.shown}|{one.made}\n" for one in exchanges)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "7c20e075ef9d2517"


@pytest.mark.parametrize("kind", ["edit", "pair"])
def test_changes_lead_to_seen_scenes_alone(kind):
    for exchanges in dialogues(kind, outputs=("video",), inputs=("video",), split="seen"):
        for exchange, known in follow(exchanges):
            if len(known) == 5:
                assert Scene(**known).split == "seen", exchange


def test_later_turns_are_of_every_sort():
    found = dialogues("edit", 300, outputs=MEDIA)
    assert {len(exchanges) for exchanges in found} == {2, 3, LONGEST}
    later = [exchange for exchanges in found for exchange in exchanges[1:]]
    assert {medium for exchange in later for medium, _ in exchange.made} == set(MEDIA)
    assert any(exchange.shown for exchange in later), "another medium comes in later"
    assert any(exchange.answer.startswith(("It is", "Yes", "No")) for exchange in later)
    assert any(exchange.asked.startswith("The same, but") for exchange in later)


def test_pairs_are_two_media_of_one_scene_or_a_medium_and_words():
    kinds = set()
    for (exchange,) in dialogues("pair", 200, outputs=MEDIA):
        kinds.add("+".join(shown.modality for shown in exchange.shown))
        assert len({shown.scene for shown in exchange.shown}) == 1
        assert len(exchange.shown) == 2 or parse(exchange.asked)
    assert kinds == {"image", "video", "audio", "image+audio"}


def test_pairs_that_are_named_come_with_the_words_anywhere():
    found = {}
    for (exchange,) in dialogues("pair", 400, outputs=MEDIA, pairs=PAIRS):
        if len(exchange.shown) == 2:
            places = found.setdefault("+".join(shown.modality for shown in exchange.shown), set())
            places.add(exchange.words_at)
            reply = parse(exchange.answer)
            known = {name: value for one in exchange.shown for name, value in one.scene.factors(one.modality).items()}
            assert reply.items() <= known.items() and (exchange.made or reply == known)
    assert found == {pair: {None, 0, 1} for pair in PAIRS}
    both = {
        "+".join(one.modality for one in each.shown)
        for (each,) in dialogues("several", 200, outputs=MEDIA, pairs=PAIRS)
    }
    assert both >= set(PAIRS)
    assert all(len(each.shown) == 1 for (each,) in dialogues("pair", pairs=()))


def test_two_media_are_made_in_the_order_asked():
    orders = set()
    for (exchange,) in dialogues("several", outputs=MEDIA):
        media = [medium for medium, _ in exchange.made]
        orders.add(tuple(media))
        words = {"image": "draw|paint|picture", "video": "film|animate|video", "audio": "play|hear|sound"}
        first, second = (re.search(words[medium], exchange.asked.lower()).start() for medium in media)
        assert first < second
    assert len(orders) == 6


@pytest.mark.parametrize("outputs", [(), ("image",), MEDIA])
def test_what_can_be_made_is_never_declined(outputs):
    for (exchange,) in dialogues("refuse", 200, outputs=outputs):
        assert not exchange.made
        declined = re.fullmatch(r"I can't make a (.*)\.", exchange.answer)
        if declined:
            named = {"picture": "image", "video": "video", "sound": "audio"}.get(declined[1])
            assert named not in outputs
        else:
            assert re.fullmatch(r"I (see|hear) no \w+\.", exchange.answer) and not exchange.shown


@pytest.mark.parametrize("kind", MIX)
def test_every_kind_works_with_pictures_alone(kind):
    if kind == "several":
        with pytest.raises(ConfigError, match="'several', which needs 2 of image, video and audio in data.outputs"):
            dialogues(kind, 1)
        return
    for exchanges in dialogues(kind, 30, inputs=("image",), turns=0.5):
        assert {medium for exchange in exchanges for medium, _ in exchange.made} <= {"image"}
        assert {shown.modality for exchange in exchanges for shown in exchange.shown} <= {"image", "text"}
        assert all(shown.entry == 3 for exchange in exchanges for shown in exchange.shown)


def test_the_language_is_small():
    texts = []
    for kind in MIX:
        for exchanges in dialogues(kind, 400, inputs=INPUTS, outputs=MEDIA, turns=0.3, pairs=PAIRS):
            texts += [text for exchange in exchanges for text in (exchange.asked, exchange.answer)]
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = Scene.random(rng)
        texts += [make_request(scene, medium, rng) for medium in MEDIA] + [convert_request("image", MEDIA[:2], rng)]
        texts += [question(scene, "place", rng)[0], describe_request("text", rng)]
    assert len(set(re.findall(r"[a-z]+", " ".join(texts).lower()))) < 260


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mix": {"describ": 1.0}}, r"'describ'.*did you mean 'describe'\?"),
        ({"outputs": ("vidoe",)}, r"'vidoe'.*did you mean 'video'\?"),
        ({"inputs": ("dept",)}, r"data.inputs 'dept'.*did you mean 'depth'\?"),
        ({"mix": {"pair": 1.0}, "inputs": ()}, "'pair' but data.inputs is empty"),
        ({"pairs": ("audio+vidoe",)}, r"data.pairs 'audio\+vidoe'.*did you mean 'audio\+video'\?"),
        (
            {"pairs": ("audio+video",), "inputs": ("image", "audio")},
            r"data.pairs has 'audio\+video', but data.inputs is",
        ),
        ({"mix": {"edit": 1.0}, "outputs": ()}, "'edit', which needs 1 of image"),
    ],
)
def test_kinds_that_cannot_be_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Dialogues(lambda rng, source: (Scene.random(rng), 0), **options)
