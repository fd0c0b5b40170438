"""Short answers against what people answered: VQA accuracy, and accuracy where there is one answer."""

import itertools
import re
from collections.abc import Sequence

from mmbridge.errors import DataError

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = {"a", "an", "the"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've "
    "he's how'd how'll how's isn't it'd it'd've it'll let's ma'am mightn't mightn't've might've mustn't must've needn't "
    "not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've someone'd someone'd've someone'll "
    "someone's something'd something'd've something'll that'd that'd've that's there'd there'd've there're there's "
    "they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's where'd "
    "where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all "
    "y'all'll y'all'd've you'd you'd've you'll you're you've"
)


def _without_apostrophes(word: str) -> list[str]:
    """Return a contraction with one or more of its apostrophes left out."""
    pieces = word.split("'")
    joins = itertools.product(("", "'"), repeat=len(pieces) - 1)
    return ["".join(itertools.chain(*zip(pieces, (*join, ""), strict=True))) for join in joins if "" in join]


_RESTORED = {bare: word for word in _CONTRACTIONS.split() for bare in _without_apostrophes(word)}


def normalise_answer(answer: str) -> str:
    """Return an answer as the VQA evaluation compares it.

    Lower case; numbers up to ten as digits; no articles; apostrophes put back ("dont" is "don't"); no full stops but in
    numbers; other punctuation removed where it stands beside a space, or where the answer has a comma between digits, and
    else turned into a space ("yes/no" is "yes no").

    Source: Antol et al., "VQA", arXiv 1505.00468, and https://visualqa.org/evaluation.html.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    text = answer
    for mark in _MARKS:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or re.search(r"\d,\d", answer) else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answers: Sequence[str], people: Sequence[Sequence[str]]) -> float:
    """Return VQA accuracy: min(people who gave this answer / 3, 1), averaged over all subsets that leave one person out.

    Differs from the official script in one case: that compares answers as they are where all people gave the same one.

    Args:
        answers: One per question.
        people: What people answered, ten per question in VQA v2.

    Source: Antol et al., "VQA", arXiv 1505.00468, section 4, with the averaging of https://visualqa.org/evaluation.html.

    Raises:
        DataError: Lists of different lengths, or fewer than two people for a question.
    """
    if len(answers) != len(people) or not answers or min(map(len, people)) < 2:
        raise DataError(
            f"{len(answers)} answers can't be scored against those of people to {len(people)} questions; give at least "
            "one question, one answer per question, and what two or more people answered."
        )
    total = 0.0
    for answer, given in zip(answers, people, strict=True):
        ours, theirs = normalise_answer(answer), [normalise_answer(each) for each in given]
        same = theirs.count(ours)
        total += sum(min((same - (each == ours)) / 3, 1.0) for each in theirs) / len(theirs)
    return total / len(answers)


def answer_accuracy(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the share of answers that equal the wanted one after ``normalise_answer``.

    Raises:
        DataError: Lists of different lengths, or empty ones.
    """
    if len(answers) != len(wanted) or not answers:
        raise DataError(f"{len(answers)} answers can't be scored against {len(wanted)}; give one for each.")
    pairs = zip(answers, wanted, strict=True)
    return sum(normalise_answer(answer) == normalise_answer(right) for answer, right in pairs) / len(answers)
