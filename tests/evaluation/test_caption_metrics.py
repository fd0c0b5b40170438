"""Caption metrics against published cases, arithmetic by hand, and numbers of other implementations."""

import math
import shutil

import pytest
from torchmetrics.text import BLEUScore

from mmbridge.errors import DataError, MissingExtraError
from mmbridge.evaluation.metrics import bleu, cider_d, meteor, rouge_l, tokenize

# Numbers of pycocoevalcap 1.2 (BLEU, CIDEr-D, ROUGE-L of the COCO caption toolkit) on these four images.
MADE = [
    "a man runs on the grass with a dog",
    "two women sit in the park",
    "a red ball",
    "a red ball on the grass now",
]
REFERENCES = [
    ["a man and his dog run on the grass", "a man runs with a dog"],
    ["two women are sitting in a park", "women sit in the park", "two people on a bench in the park"],
    ["a red ball on the grass", "the ball is red"],
    ["a ball on the grass", "a red ball lies on the grass"],
]
BLEU = [0.96, 0.90711474, 0.78516062, 0.57811383]
CIDER = 3.18094599
ROUGE = 0.82977544


def test_bleu_counts_a_word_at_most_as_often_as_a_reference_has_it():
    # The BLEU paper, section 2.1, example 2: seven times "the", of which a reference has two.
    scores = bleu(["the the the the the the the"], [["The cat is on the mat.", "There is a cat on the mat."]])
    assert scores == pytest.approx([2 / 7, 0, 0, 0])


def test_bleu_of_the_first_example_of_the_paper():
    # The paper's candidate 1 has 17 of 18 words in a reference, and 10 of 17 pairs.
    candidate = "It is a guide to action which ensures that the military always obeys the commands of the party"
    references = [
        "It is a guide to action that ensures that the military will forever heed Party commands",
        "It is the guiding principle which guarantees the military forces always being under the command of the Party",
        "It is the practical guide for the army always to heed the directions of the party",
    ]
    scores = bleu([candidate], [references])
    # 18 words; the references have 16, 18 and 16, so the closest is as long and there is no penalty
    assert scores[0] == pytest.approx(17 / 18)
    assert scores[1] == pytest.approx(math.sqrt(17 / 18 * 10 / 17))


def test_bleu_penalises_the_length_of_the_corpus_not_of_captions():
    # 3 + 5 words made; closest references have 4 and 5 (of 5 and 3, the nearer). All words and pairs are right.
    scores = bleu(["a b c", "a b c d e"], [["a b c d"], ["a b c d e", "a b"]])
    assert scores == pytest.approx([math.exp(1 - 9 / 8)] * 4)
    # equally close references: the shorter counts, so nothing is penalised
    assert bleu(["a b c"], [["a b c d", "a b"]])[0] == pytest.approx(1)


def test_bleu_equals_another_implementation():
    # which takes the first of two equally close references, so that the shorter must stand first
    references = [sorted(listed, key=lambda text: len(text.split())) for listed in REFERENCES]
    reference = [BLEUScore(n_gram=order)(MADE, references).item() for order in range(1, 5)]
    assert bleu(MADE, REFERENCES) == pytest.approx(reference, abs=1e-6)


def test_rouge_l_by_hand():
    # "the cat was under" and "the cat sat there under": the, cat, under in common. P = 3/4, R = 3/5.
    precision, recall = 3 / 4, 3 / 5
    wanted = (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)
    assert rouge_l(["the cat was under"], [["the cat sat there under"]]) == pytest.approx(wanted)
    # The better reference counts for each of P and R; a caption without a common word has 0; the mean is over captions.
    wanted = (2.44 * 1 * 1 / (1 + 1.44)) / 2
    assert rouge_l(["a b", "x"], [["a b", "q a b c d"], ["y z"]]) == pytest.approx(wanted)


def test_cider_d_by_hand():
    # Two images, so an n-gram in one of them weighs log 2 and one in both weighs 0.
    # Image 1: made "red dog runs", reference "red dog sits" ; image 2: made "cat", reference "cat".
    # n=1: {red, dog, runs}: "runs" is in no reference: log(2) - log(max(1, 0)) = log 2. So all weights are log 2:
    #   cosine = 2 / (sqrt 3 * sqrt 3) = 2/3. n=2: {red dog, dog runs} and {red dog, dog sits}: 1/2. n=3: 0. n=4: none.
    # Image 2: n=1: 1; it has no longer n-grams. Lengths are equal. So the mean is 10 / 4 * (2/3 + 1/2 + 1) / 2.
    made, references = ["red dog runs", "cat"], [["red dog sits"], ["cat"]]
    assert cider_d(made, references) == pytest.approx(10 / 4 * (2 / 3 + 1 / 2 + 1) / 2)
    # One word more: delta is 1. n=1: 2 / (sqrt 4 * sqrt 3); n=2: 1 / (sqrt 3 * sqrt 2).
    decay = math.exp(-1 / 72)
    first = decay * (2 / math.sqrt(12) + 1 / math.sqrt(6))
    assert cider_d(["red dog runs off", "cat"], references) == pytest.approx(10 / 4 * (first + 1) / 2)
    # A word said twice is clipped to the reference's count: min(2, 1) * 1 over sqrt(4 + 0) * sqrt 1, one bigram more.
    assert cider_d(["cat cat", "cow"], [["cat"], ["cow"]]) == pytest.approx(10 / 4 * (decay * 1 / 2 + 1) / 2)
    # A word of every image weighs nothing, and several references are averaged.
    assert cider_d(["a", "a"], [["a"], ["a"]]) == 0
    assert cider_d(["cat", "cow"], [["cat", "dog"], ["cow"]]) == pytest.approx(10 / 4 * (1 / 2 + 1) / 2)


def test_scores_equal_those_of_the_coco_caption_toolkit():
    assert bleu(MADE, REFERENCES) == pytest.approx(BLEU, abs=1e-6)
    assert cider_d(MADE, REFERENCES) == pytest.approx(CIDER, abs=1e-6)
    assert rouge_l(MADE, REFERENCES) == pytest.approx(ROUGE, abs=1e-6)


# What the toolkit's tokenizer (Stanford CoreNLP 3.4.1, in Java) makes of these.
TOKENS = {
    "A man's dog, running!": "a man 's dog running",
    "I don't know; he can't see it.": "i do n't know he ca n't see it",
    'A t-shirt that says "STOP".': "a t-shirt that says stop",
    "Two dogs (brown) play - in the snow.": "two dogs -lrb- brown -rrb- play in the snow",
    "cannot gonna wanna gotta": "can not gon na wan na got ta",
    "at 10:30 p.m. on St. Mary's street": "at 10:30 p.m. on st. mary 's street",
    "$5.00 & 3,000 people 50%": "$ 5.00 & 3,000 people 50 %",
    "a boy/girl on a 2-story house": "a boy/girl on a 2-story house",
    "The U.S. flag... waves": "the u.s. flag waves",
    "It’s a “nice” day": "it 's a nice day",
    "they're we'll I've I'd I'm": "they 're we 'll i 've i 'd i 'm",
    "a cat ,a dog": "a cat a dog",
    "dogs' toys": "dogs toys",
    "'90s car": "'90s car",
    "man w/ hat": "man w / hat",
    "[brackets] {curly}": "-lsb- brackets -rsb- -lcb- curly -rcb-",
    "5 o'clock": "5 o'clock",
    "naïve café": "naïve café",
    "end.Next": "end.next",
}


@pytest.mark.parametrize("text", TOKENS)
def test_tokens_are_those_of_the_coco_caption_toolkit(text):
    assert " ".join(tokenize(text)) == TOKENS[text]


@pytest.mark.parametrize("metric", (bleu, cider_d, rouge_l))
def test_empty_captions_score_nothing_and_lists_must_match(metric):
    assert metric([""], [["a dog"]]) in (0, [0, 0, 0, 0])
    for made, references in (([], []), (["a"], []), (["a"], [[]])):
        with pytest.raises(DataError, match="can't be scored against"):
            metric(made, references)


def test_meteor_is_that_of_its_authors_program():
    pytest.importorskip("pycocoevalcap.meteor.meteor")
    if shutil.which("java") is None:
        pytest.skip("METEOR needs Java")
    # Equal captions in one chunk have no penalty for fragmentation, and METEOR 1.5 gives them 1.
    assert meteor(["a red ball", "Two dogs."], [["a red ball"], ["two dogs", "a cat"]]) == pytest.approx(1.0)


def test_meteor_without_java_that_works_says_so(tmp_path, monkeypatch):
    pytest.importorskip("pycocoevalcap.meteor.meteor")
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match="ended early"):
        meteor(["a red ball"], [["a red ball"]])


def test_meteor_says_what_it_needs(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingExtraError, match="install a Java runtime"):
        meteor(["a red ball"], [["a red ball"]])
