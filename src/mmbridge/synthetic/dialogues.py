"""Dialogues about scenes as requests with their right replies, before anything is rendered.

The same dialogues become the data of bridges, where media are rendered, and that of the tiny language model, where a sentence
stands in for each medium. What is known of the scene is tracked over the turns: a reply names the factors that were
given or asked for so far and that the wanted medium can show, and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmbridge.errors import ConfigError
from mmbridge.synthetic import requests
from mmbridge.synthetic.conversation import answer, chat_pairs, describe_request, question
from mmbridge.synthetic.language import pick, sentence, shared_caption
from mmbridge.synthetic.scene import CARRIES, FACTORS, Scene, lookup

MIX = {
    "describe": 1.0, "question": 0.0, "draw": 0.0, "convert": 0.0, "text": 0.0, "chat": 0.0, "edit": 0.0, "pair": 0.0,
    "several": 0.0, "refuse": 0.0,
}  # fmt: skip
"""Kinds of dialogue and their default weights: describe or question a medium, make a medium from words, make one from a
medium, answer about a scene described in words, small talk, change in later turns what was made, use a medium together with
another or with words, make two media at once, decline what can't be made."""

LONGEST = 4
"""Most turns of a dialogue."""


@dataclass(frozen=True)
class Shown:
    """A scene that comes in as a medium, or as a sentence where ``modality`` is "text".

    ``entry`` is its number among the scenes that dialogues draw, by which renderings are kept.
    """

    modality: str
    scene: Scene
    entry: int = 0


@dataclass(frozen=True)
class Exchange:
    """A turn of the user and the right reply.

    Attributes:
        asked: The words of the user.
        answer: The words of the reply.
        shown: What comes with the user's words, in order.
        made: The media behind the words of the reply, in order: modality and canonical caption.
        words_at: How many of what is shown stand before the user's words; None for all.
    """

    asked: str
    answer: str
    shown: tuple[Shown, ...] = ()
    made: tuple[tuple[str, str], ...] = ()
    words_at: int | None = None


@dataclass(frozen=True)
class Topic:
    """What a dialogue is about so far.

    Attributes:
        scene: The scene, with all changes.
        known: The factors that were given or asked for.
        made: The media of the last reply that held any.
    """

    scene: Scene
    known: tuple[str, ...]
    made: tuple[str, ...] = ()


def make(asked: str, topic: Topic, media: Sequence[str], shown: tuple[Shown, ...] = ()) -> Exchange:
    """Return a request for media of a topic, with its reply: the caption in words, then the media."""
    words = shared_caption(topic.scene, topic.known, *media)
    made = tuple((medium, shared_caption(topic.scene, topic.known, medium)) for medium in media)
    return Exchange(asked, f"Here is {words}.", shown, made)


class Dialogues:
    """Random dialogues.

    Args:
        draw: Draws a scene that a source may show (see ``Scene.split_for``), and its number; the scenes that dialogues start
            from. The source is a modality, or two joined by "+"; "text" where words give the scene.
        mix: Weights of the kinds of dialogue (see ``MIX``); kinds that are not named have weight 0.
        inputs: What the user shows: any of ``requests.INPUTS``, and "text" for sentences in place of media.
        outputs: Media that can be made; requests for others are declined.
        turns: Chance that a dialogue about a medium goes on by a further turn.
        split: Which scenes a change may lead to; None for all.
        pairs: Which two media come in together (see ``requests.PAIRS``), the user's words before, between or behind them.
            None for a picture and a sound where both come in, with the words behind them.
        shares: How often each of ``inputs`` comes in, and a pair by the smaller share of its media; an input of share 0 is left
            out. None for all equally often.

    Raises:
        ConfigError: A kind or a pair is not known, or lacks the media that it needs.
    """

    def __init__(
        self,
        draw: Callable[[np.random.Generator, str], tuple[Scene, int]],
        mix: Mapping[str, float] | None = None,
        inputs: Sequence[str] = requests.MEDIA,
        outputs: Sequence[str] = ("image",),
        turns: float = 0.0,
        split: str | None = None,
        pairs: Sequence[str] | None = None,
        shares: Mapping[str, float] | None = None,
    ):
        self.weights = {kind: float(weight) for kind, weight in (mix or MIX).items() if weight > 0}
        self.draw, self.shares, self.outputs = draw, shares, tuple(outputs)
        self.inputs = tuple(name for name in inputs if shares is None or shares[name] > 0)
        self.turns, self.split, self.words_anywhere = turns, split, pairs is not None
        for medium in self.outputs:
            lookup("data.outputs", medium, requests.MEDIA)
        for name in self.inputs:
            lookup("data.inputs", name, ("text", *requests.INPUTS))
        for pair in pairs or ():
            lookup("data.pairs", pair, requests.PAIRS)
            if not set(pair.split("+")) <= set(self.inputs):
                raise ConfigError(
                    f"data.pairs has {pair!r}, but data.inputs is {list(self.inputs)}; add what is missing there."
                )
        together = {"image", "audio"} <= set(self.inputs)
        self.pairs = tuple(pairs) if pairs is not None else ("image+audio",) if together else ()
        for kind in self.weights:
            lookup("data.mix", kind, tuple(MIX))
            needed = {"several": 2, "draw": 1, "convert": 1, "edit": 1}.get(kind, 0)
            if len(self.outputs) < needed:
                raise ConfigError(
                    f"data.mix has the kind {kind!r}, which needs {needed} of image, video and audio in data.outputs, "
                    f"not {list(self.outputs)}; add them or leave the kind out."
                )
            if not self.inputs and kind in ("describe", "question", "convert", "pair"):
                raise ConfigError(f"data.mix has the kind {kind!r} but data.inputs is empty; name what comes in.")

    def compose(self, rng: np.random.Generator) -> list[Exchange]:
        """Return one dialogue."""
        shares = np.array(list(self.weights.values()))
        kind = str(rng.choice(list(self.weights), p=shares / shares.sum()))
        if kind == "chat":
            return [Exchange(asked, answer) for asked, answer in chat_pairs(rng)]
        if kind in ("draw", "several"):
            exchange = self._several(rng) if kind == "several" else self._draw(rng, (pick(self.outputs, rng),))[0]
            return [self._place_words(exchange, rng)]
        if kind == "pair":
            return [self._place_words(self._pair(rng), rng)]
        if kind == "refuse":
            return [self._refuse(rng)]
        return self._edit(rng) if kind == "edit" else self._about(kind, rng)

    def _pick(self, sources: Sequence[str], rng: np.random.Generator) -> str:
        """One of what may come in."""
        if self.shares is None:
            return pick(sources, rng)
        parts = np.array([min(self.shares[name] for name in source.split("+")) for source in sources])
        return sources[int(rng.choice(len(sources), p=parts / parts.sum()))]

    def _show(self, rng: np.random.Generator, source: str) -> tuple[Topic, tuple[Shown, ...]]:
        """A scene that comes in, by one medium or, joined by "+", by two."""
        scene, entry = self.draw(rng, source)
        names = source.split("+")
        return Topic(scene, _united(*names)), tuple(Shown(name, scene, entry) for name in names)

    def _draw(self, rng: np.random.Generator, media: tuple[str, ...]) -> tuple[Exchange, Topic]:
        """Media from words."""
        scene, _ = self.draw(rng, "text")
        topic = Topic(scene, _united(*media), media)
        return make(requests.make_request(scene, media, rng), topic, media), topic

    def _ask(
        self, kind: str, rng: np.random.Generator, topic: Topic, shown: tuple[Shown, ...], source: str
    ) -> tuple[Exchange, tuple[str, str]]:
        """A request about what is given, and what was asked for: the kind, and the factor or medium."""
        if kind == "convert":
            medium = pick(self.outputs, rng)
            return make(requests.convert_request(source, medium, rng), topic, (medium,), shown), (kind, medium)
        if kind == "describe":
            return Exchange(describe_request(source, rng), _description(topic), shown), (kind, "")
        factor = pick(topic.known, rng)
        return Exchange(*question(topic.scene, factor, rng), shown), (kind, factor)

    def _another(self, rng: np.random.Generator, asked: tuple[str, str]) -> tuple[Exchange, Topic, str]:
        """The last request once more, of something else that comes in."""
        kind, what = asked
        source = self._pick([name for name in self.inputs if kind != "question" or what in CARRIES[name]], rng)
        topic, shown = self._show(rng, source)
        words = requests.another_request(rng)
        if kind == "convert":
            exchange = make(words, topic, (what,), shown)
        else:
            reply = _description(topic) if kind == "describe" else answer(topic.scene, what)
            exchange = Exchange(words, reply, shown)
        return exchange, replace(topic, made=tuple(name for name, _ in exchange.made)), source

    def _about(self, kind: str, rng: np.random.Generator) -> list[Exchange]:
        """Turns about media, or about a scene in words; now and then the next turn brings another one."""
        source = "text" if kind == "text" else self._pick(self.inputs, rng)
        kinds = [name for name in ("describe", "question", "convert") if kind != "text" and name in self.weights]
        kinds = kinds or ["describe", "question"]
        topic, shown = self._show(rng, source)
        exchange, asked = self._ask(pick(kinds, rng) if kind == "text" else kind, rng, topic, shown, source)
        exchanges = [exchange]
        while rng.random() < self.turns and len(exchanges) < LONGEST:
            if kind != "text" and rng.random() < 0.3:
                exchange, topic, source = self._another(rng, asked)
            else:
                exchange, asked = self._ask(pick(kinds, rng), rng, topic, (), source)
            exchanges.append(exchange)
        return exchanges

    def _edit(self, rng: np.random.Generator) -> list[Exchange]:
        """Turns that come back to what was made or described, with and without changes."""
        asked: tuple[str, str] | None = None
        if not self.inputs or rng.random() < 0.35:
            exchange, topic = self._draw(rng, (pick(self.outputs, rng),))
        else:
            source = self._pick(self.inputs, rng)
            topic, shown = self._show(rng, source)
            kind = pick(("convert", "convert", "describe", "question"), rng)
            exchange, asked = self._ask(kind, rng, topic, shown, source)
            topic = replace(topic, made=tuple(name for name, _ in exchange.made))
        exchanges = [exchange]
        for _ in range(int(rng.integers(1, LONGEST))):
            chance = rng.random()
            if asked is not None and chance < 0.12:
                exchange, topic, _ = self._another(rng, asked)
            elif chance < 0.75 or len(exchanges) == 1:
                exchange, topic = self._change(rng, topic)
                asked = None
            elif chance < 0.95:
                exchange, asked = Exchange(*question(topic.scene, pick(topic.known, rng), rng)), None
            else:
                exchange, asked = Exchange(describe_request("text", rng), _description(topic)), None
            exchanges.append(exchange)
        return exchanges

    def _change(self, rng: np.random.Generator, topic: Topic) -> tuple[Exchange, Topic]:
        """The same medium with a change, or one that is named, with or without."""
        same = len(topic.made) == 1 and rng.random() < 0.55
        medium = topic.made[0] if same else pick(self.outputs, rng)
        scene, changed = topic.scene, tuple[str, ...]()
        if same or rng.random() < 0.6:
            scene, changed = requests.change_scene(scene, CARRIES[medium], rng, self.split)
        topic = Topic(scene, ordered({*topic.known, *changed}), (medium,))
        asked = requests.again_request(scene, changed, rng) if same and changed else None
        return make(asked or requests.then_request(scene, changed, medium, rng), topic, topic.made), topic

    def _place_words(self, exchange: Exchange, rng: np.random.Generator) -> Exchange:
        """The same with the user's words anywhere among two media, half of the time behind them."""
        if not self.words_anywhere or len(exchange.shown) < 2 or rng.random() < 0.5:
            return exchange
        return replace(exchange, words_at=int(rng.integers(len(exchange.shown))))

    def _pair(self, rng: np.random.Generator) -> Exchange:
        """Two media together, or a medium and words that change it."""
        singles = [name for name in self.inputs if name != "text"]
        both = bool(self.pairs) and rng.random() < 0.4
        source = self._pick(self.pairs if both else singles, rng)
        wanted = pick(("text", *self.outputs), rng)
        topic, shown = self._show(rng, source)
        if both and wanted == "text":
            return Exchange(describe_request(source, rng), _description(topic), shown)
        if both:
            return make(requests.convert_request(source, wanted, rng), topic, (wanted,), shown)
        factors = CARRIES[source if wanted == "text" else wanted]
        scene, changed = requests.change_scene(topic.scene, factors, rng, self.split, source)
        if not changed:
            return self._ask("describe" if wanted == "text" else "convert", rng, topic, shown, source)[0]
        topic = Topic(scene, ordered({*topic.known, *changed}))
        asked = requests.change_request(scene, changed, wanted, rng)
        return Exchange(asked, _description(topic), shown) if wanted == "text" else make(asked, topic, (wanted,), shown)

    def _several(self, rng: np.random.Generator) -> Exchange:
        """Two media at once, from words or from what comes in."""
        media = tuple(self.outputs[index] for index in rng.permutation(len(self.outputs))[:2])
        if not self.inputs or rng.random() < 0.5:
            return self._draw(rng, media)[0]
        source = self._pick([*self.inputs, *self.pairs], rng)
        topic, shown = self._show(rng, source)
        return make(requests.convert_request(source, media, rng), topic, media, shown)

    def _refuse(self, rng: np.random.Generator) -> Exchange:
        """A request for what can't be made, or of a medium that isn't there."""
        lacking = [medium for medium in requests.MEDIA if medium not in self.outputs]
        source = self._pick(self.inputs, rng) if self.inputs and rng.random() < 0.5 else None
        if self.outputs and rng.random() < 0.25:
            missing = requests.missing_request(pick(requests.MEDIA, rng), pick(self.outputs, rng), rng)
            return Exchange(*missing)
        topic, shown = (Topic(self.draw(rng, "text")[0], ()), ()) if source is None else self._show(rng, source)
        if not lacking or rng.random() < 0.4:
            return Exchange(*requests.impossible_request(source, topic.scene, rng), shown)
        medium = pick(lacking, rng)
        if source is None:
            return Exchange(requests.make_request(topic.scene, medium, rng), requests.refusal(medium))
        return Exchange(requests.convert_request(source, medium, rng), requests.refusal(medium), shown)


def ordered(factors: Collection[str]) -> tuple[str, ...]:
    """Return factors in the order of ``FACTORS``."""
    return tuple(factor for factor in FACTORS if factor in factors)


def _united(*modalities: str) -> tuple[str, ...]:
    """The factors that modalities carry together."""
    return ordered({factor for modality in modalities for factor in CARRIES[modality]})


def _description(topic: Topic) -> str:
    return sentence(shared_caption(topic.scene, topic.known, "text"))
