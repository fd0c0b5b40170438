"""Accuracy of short answers, counted by hand."""

import itertools

import pytest

from mmbridge.errors import DataError
from mmbridge.evaluation.metrics import answer_accuracy, normalise_answer, vqa_accuracy


@pytest.mark.parametrize("agree, wanted", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_people(agree, wanted):
    # One of ten agrees: nine of the ten subsets of nine hold them and give 1/3, one gives 0: 0.3.
    # Three: seven subsets hold all three and give 1, three hold two and give 2/3: 0.9. Four: every subset holds three.
    people = ["red"] * agree + [f"other {number}" for number in range(10 - agree)]
    assert vqa_accuracy(["red"], [people]) == pytest.approx(wanted)
    subsets = itertools.combinations(people, 9)
    assert wanted == pytest.approx(sum(min(subset.count("red") / 3, 1) for subset in subsets) / 10)


def test_vqa_accuracy_is_the_mean_over_questions_of_normalised_answers():
    people = [["two", "2", "The 2"] + ["3"] * 7, ["dont know"] * 10]
    assert vqa_accuracy(["Two.", "don't know"], people) == pytest.approx((0.9 + 1) / 2)


# By the rules that https://visualqa.org/evaluation.html lists.
@pytest.mark.parametrize(
    "answer, wanted",
    [
        ("The Red Car.", "red car"),
        ("none", "0"),
        ("ten", "10"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("it's", "it's"),
        ("yes/no", "yes no"),
        ("yes, sir", "yes sir"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("what?", "what"),
        ("hot-dog", "hot dog"),
        (" new\nyork\t", "new york"),
        ("a", ""),
    ],
)
def test_answers_are_normalised(answer, wanted):
    assert normalise_answer(answer) == wanted


def test_answer_accuracy():
    assert answer_accuracy(["A couch.", "dog", "two"], ["couch", "cat", "2"]) == pytest.approx(2 / 3)


def test_lists_must_match():
    with pytest.raises(DataError, match="1 answers can't be scored against those of people to 0 questions"):
        vqa_accuracy(["a"], [])
    with pytest.raises(DataError, match="what two or more people answered"):
        vqa_accuracy(["a"], [["a"]])
    with pytest.raises(DataError, match="0 answers can't be scored against 0"):
        answer_accuracy([], [])
