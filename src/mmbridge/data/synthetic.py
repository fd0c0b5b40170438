"""Dialogues over the synthetic world: the data of the shipped recipes.

Training draws scenes whose combinations are all "seen", those that a request changes into included.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmbridge.data.mixing import mixing_shares
from mmbridge.data.tasks import EVALUATION, answer_tasks, is_right, make_task, opening
from mmbridge.messages import Message
from mmbridge.synthetic import Scene
from mmbridge.synthetic.dialogues import Dialogues, Exchange

POOL = 2000
"""Media per modality among which a data set draws; their features are computed once."""


def render_exchange(exchange: Exchange, seed: int, rng: np.random.Generator) -> list[Message]:
    """Return a turn of the user, its media rendered, and the reply, whose media are given by their captions."""
    asked = [opening(shown, seed + shown.entry, rng) for shown in exchange.shown]
    asked.insert(len(asked) if exchange.words_at is None else exchange.words_at, _text(exchange.asked))
    reply = [_text(exchange.answer), *({"type": medium, "caption": words} for medium, words in exchange.made)]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]


def _text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


class SyntheticData:
    """Training dialogues over scenes, drawn from a seed; sample ``i`` is always the same.

    Args:
        samples: Number of dialogues.
        inputs: Modalities that come in; each shows scenes of its own split alone (see ``Scene.split_for``).
        outputs: Media that can be asked for; requests for others are declined.
        mix: Weights of the kinds of dialogue (see ``mmbridge.synthetic.dialogues.MIX``); kinds that are not named have
            weight 0.
        turns: Chance that a dialogue about a medium goes on by a further turn.
        pool: Media per modality among which dialogues draw; their features are computed once.
        pairs: Which two media come in together (see ``mmbridge.synthetic.requests.PAIRS``), the user's words before, between
            or behind them; None for a picture and a sound where both come in, with the words behind them.
        weights: How often each of ``inputs`` comes in, 1 where it is not named; 0 leaves it out.
        replay: Inputs of earlier stages and their part of what comes in, as ``{"share": 0.4, "of": ["image"]}``.
        split: "seen" for training, "unseen" for validation.
        seed: Seed of everything.

    Raises:
        ConfigError: An unknown kind, medium or pair, or a kind or pair that lacks the media it needs.
    """

    def __init__(
        self,
        samples: int = 4000,
        inputs: Sequence[str] = ("image", "video", "audio"),
        outputs: Sequence[str] = ("image",),
        mix: Mapping[str, float] | None = None,
        turns: float = 0.0,
        pool: int = POOL,
        pairs: Sequence[str] | None = None,
        weights: Mapping[str, float] | None = None,
        replay: Mapping[str, Any] | None = None,
        split: str = "seen",
        seed: int = 0,
    ):
        self.samples, self.pool, self.split, self.seed = samples, pool, split, seed
        mixed = weights is not None or replay is not None
        shares = mixing_shares(dict.fromkeys(inputs, 1), weights, replay=replay) if mixed else None
        self.dialogues = Dialogues(self._draw, mix, inputs, outputs, turns, split, pairs, shares)

    def __len__(self) -> int:
        return self.samples

    def _draw(self, rng: np.random.Generator, source: str) -> tuple[Scene, int]:
        entry = int(rng.integers(self.pool))
        return Scene.random(np.random.default_rng([self.seed, entry]), self.split, source), entry

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one sample: ``{"messages": [...]}``."""
        if not 0 <= index < self.samples:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, index, 1])
        exchanges = self.dialogues.compose(rng)
        turns = [render_exchange(exchange, self.seed * self.pool, rng) for exchange in exchanges]
        return {"messages": [message for turn in turns for message in turn]}

    def judge(self, bridge: Any, count: int = 8, seed: int = 0) -> dict[str, float]:
        """Return the share of right answers per direction that this data trains, on unseen combinations."""
        kinds, inputs, outputs = self.dialogues.weights, self.dialogues.inputs, self.dialogues.outputs
        made = [medium for medium in outputs if medium in bridge.outputs]
        directions: list[tuple[str, str, int]] = []
        for source in inputs:
            directions += [(source, "text", 1)] if {"describe", "question"} & set(kinds) else []
            directions += [(source, medium, 1) for medium in made if "convert" in kinds]
        directions += [("text", medium, 1) for medium in made if "draw" in kinds]
        directions += [("text", medium, 2) for medium in made if "edit" in kinds]
        if "pair" in kinds:
            directions += [(pair, wanted, 1) for pair in self.dialogues.pairs for wanted in ("text", *made)]
        directions += [("text", "+".join(made[:2]), 1)] if "several" in kinds and len(made) > 1 else []
        accuracy = {}
        for source, wanted, turn in sorted(directions):
            rng = np.random.default_rng([seed, 9])
            first = EVALUATION + seed
            scenes = [Scene.random(rng, "unseen", source) for _ in range(count)]
            tasks = [make_task(source, wanted, scene, first + i, turn) for i, scene in enumerate(scenes)]
            replies = answer_tasks(bridge, tasks)
            right = [is_right(task, reply) for task, reply in zip(tasks, replies, strict=True)]
            accuracy[f"{source} to {wanted}" + (", turn 2" if turn == 2 else "")] = float(np.mean(right))
        return accuracy
