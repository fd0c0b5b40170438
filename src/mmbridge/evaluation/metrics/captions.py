"""Captions against references: BLEU, ROUGE-L, CIDEr-D and METEOR, with the numbers of the COCO caption toolkit.

Scores are fractions, as the toolkit prints them, CIDEr-D with its factor of 10; papers mostly print them times 100.
"""

import functools
import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence

from mmbridge.errors import DataError, MissingExtraError

Tokens = tuple[str, ...]

_STRAIGHT = str.maketrans("’‘“”–—", "''\"\"  ")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = frozenset("'\"`.?!,:;-")
_CLITIC = re.compile(
    r"(?<=[a-z])(?=n't\b)|(?<=\w)(?='(?:s|m|d|ll|re|ve)\b)"
    r"|(?<=\bcan)(?=not\b)|(?<=\bgon|\bwan)(?=na\b)|(?<=\bgot)(?=ta\b)|(?<=\blem|\bgim)(?=me\b)"
)
_TOKEN = re.compile(
    r"(?<!\w)(?:(?:[a-z]\.){2,}|(?:mr|mrs|ms|dr|st|vs|jr|sr)\.(?!\w))"  # u.s. and mr. keep their full stops
    r"|n't\b|'(?:s|m|d|ll|re|ve|\d0s)\b"
    r"|\w+(?:(?:[-./'&@]|(?<=\d)[,:](?=\d))\w+)*"  # t-shirt, boy/girl, o'clock, 3,000
    r"|[^\w\s]"
)


@functools.lru_cache(maxsize=200_000)
def tokenize(text: str) -> Tokens:
    """Split a caption into lower-case tokens without punctuation, as the COCO caption toolkit does.

    The toolkit calls Stanford's Penn Treebank tokenizer, in Java, and drops punctuation; this follows its rules for
    contractions ("don't" is "do", "n't"), hyphens, numbers, abbreviations and brackets. It knows eight abbreviations of a
    word ("mr.", "st.", ...) where Stanford's has a long list, and does not join addresses with a scheme ("http://...").
    """
    spaced = _CLITIC.sub(" ", text.lower().translate(_STRAIGHT))
    return tuple(_BRACKETS.get(token, token) for token in _TOKEN.findall(spaced) if token not in _DROPPED)


def _ngrams(tokens: Tokens, order: int) -> Counter[Tokens]:
    return Counter(tokens[start : start + order] for start in range(len(tokens) - order + 1))


def _split(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[tuple[Tokens, list[Tokens]]]:
    if len(candidates) != len(references) or not candidates or not all(references):
        raise DataError(
            f"{len(candidates)} captions can't be scored against {len(references)} lists of references; give one list, "
            "of at least one reference, per caption, and at least one caption."
        )
    return [
        (tokenize(candidate), [tokenize(reference) for reference in listed])
        for candidate, listed in zip(candidates, references, strict=True)
    ]


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return BLEU-1 to BLEU-4 of a corpus, without smoothing.

    BLEU-n = BP * (p_1 * ... * p_n)^(1/n), where p_k is the share of the corpus' k-grams that are in a reference, each
    counted at most as often as in the reference that has it most, and BP = exp(1 - r/c) where the corpus is shorter (c
    tokens) than the references (r tokens, the reference closest in length per caption, the shorter of two equally close).

    Source: Papineni et al., "BLEU", ACL 2002, section 2.

    Raises:
        DataError: Lists of different lengths, or without a reference.
    """
    found, made = [0] * 4, [0] * 4
    candidate_length = reference_length = 0
    for candidate, listed in _split(candidates, references):
        candidate_length += len(candidate)
        reference_length += min((abs(len(tokens) - len(candidate)), len(tokens)) for tokens in listed)[1]
        for order in range(1, 5):
            most: Counter[Tokens] = Counter()
            for tokens in listed:
                most |= _ngrams(tokens, order)
            counts = _ngrams(candidate, order)
            made[order - 1] += counts.total()
            found[order - 1] += (counts & most).total()
    if not candidate_length:
        return [0.0] * 4
    penalty = min(1.0, math.exp(1 - reference_length / candidate_length))
    scores = []
    for order in range(1, 5):
        shares = [right / all_ if all_ else 0.0 for right, all_ in zip(found[:order], made[:order], strict=True)]
        scores.append(penalty * math.prod(shares) ** (1 / order))
    return scores


def rouge_l(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return ROUGE-L, the mean over captions of an F-measure over longest common subsequences, with beta 1.2.

    F = (1 + beta^2) P R / (R + beta^2 P), where P and R are the longest common subsequence over the length of the caption
    and of the reference, each the best over the references.

    Source: Lin, "ROUGE", ACL workshop 2004, section 3.2; beta and the maxima as in the COCO caption toolkit.

    Raises:
        DataError: Lists of different lengths, or without a reference.
    """
    scores = []
    for candidate, listed in _split(candidates, references):
        common = [_common_length(candidate, tokens) for tokens in listed]
        precision = max(common) / len(candidate) if candidate else 0.0
        recall = max(length / max(len(tokens), 1) for length, tokens in zip(common, listed, strict=True))
        scores.append(2.44 * precision * recall / (recall + 1.44 * precision) if precision else 0.0)
    return math.fsum(scores) / len(scores)


def _common_length(first: Tokens, second: Tokens) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for token in first:
        above = 0  # row[index] of the round before
        for index, other in enumerate(second):
            above, row[index + 1] = row[index + 1], above + 1 if token == other else max(row[index + 1], row[index])
    return row[-1]


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return CIDEr-D: how like the references a caption is, in n-grams weighted by how rare they are.

    For n = 1..4, n-grams are counted and weighted by log(images) - log(images with it in a reference). The score of a
    caption is 10 times the mean over n and references of the cosine of the two vectors, the caption's entries clipped to
    the reference's, times exp(-d^2 / (2 * 6^2)), where d is the difference in length.

    Source: Vedantam et al., "CIDEr", arXiv 1411.5726, equations 2 to 4 and section 7 (CIDEr-D). As in the COCO caption
    toolkit, document frequencies are those of the references given, so a score depends on which images are evaluated
    and is 0 for a single image.

    Raises:
        DataError: Lists of different lengths, or without a reference.
    """
    items = _split(candidates, references)
    documents: Counter[Tokens] = Counter()
    for _, listed in items:
        documents.update({ngram for tokens in listed for order in range(1, 5) for ngram in _ngrams(tokens, order)})

    def weigh(tokens: Tokens, order: int) -> tuple[dict[Tokens, float], float]:
        counts = _ngrams(tokens, order)
        vector = {ngram: n * math.log(len(items) / max(1, documents[ngram])) for ngram, n in counts.items()}
        return vector, math.sqrt(sum(value * value for value in vector.values()))

    total = 0.0
    for candidate, listed in items:
        for order in range(1, 5):
            ours, our_norm = weigh(candidate, order)
            for tokens in listed:
                theirs, norm = weigh(tokens, order)
                dot = sum(min(value, theirs[ngram]) * theirs[ngram] for ngram, value in ours.items() if ngram in theirs)
                if our_norm and norm:
                    # the toolkit measures length in bigrams, of which an empty caption has as many as a single word
                    apart = max(len(candidate) - 1, 0) - max(len(tokens) - 1, 0)
                    total += dot / (our_norm * norm) * math.exp(-(apart**2) / 72) / len(listed)
    return 10 * total / 4 / len(items)


def meteor(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return METEOR 1.5 by its authors' own program, as the COCO caption toolkit does.

    Source: Denkowski and Lavie, "Meteor Universal", WMT 2014.

    Raises:
        DataError: Lists of different lengths, or without a reference.
        MissingExtraError: Java, or pycocoevalcap, which carries the program and its tables, is not installed, or the
            program ends early.
    """
    items = _split(candidates, references)
    if shutil.which("java") is None:
        raise MissingExtraError("METEOR is a Java program and there is no `java`; install a Java runtime.")
    try:
        from pycocoevalcap.meteor.meteor import Meteor  # type: ignore[import-not-found,import-untyped]
    except ModuleNotFoundError as error:
        raise MissingExtraError("METEOR needs pycocoevalcap: pip install 'mmbridge[meteor]'.") from error
    made = {index: [" ".join(candidate)] for index, (candidate, _) in enumerate(items)}
    wanted = {index: [" ".join(tokens) for tokens in listed] for index, (_, listed) in enumerate(items)}
    program = Meteor()
    try:
        return float(program.compute_score(wanted, made)[0])
    except (OSError, ValueError) as error:  # a pipe to a program that ended, or what it says in place of a number
        raise MissingExtraError(
            f"METEOR's program ended early ({type(error).__name__}); it needs a Java runtime and 2 GiB of memory."
        ) from error
    finally:
        if program.lock.locked():  # an error leaves it so, and the destructor would wait for it for ever
            program.lock.release()
