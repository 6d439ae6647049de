"""Scores of answers, by hand and as the libraries define them."""

from __future__ import annotations

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from adapeft.tasks.answers import AnswerMetrics, answer_scores

REFERENCES = ["find . -name '*.py'", "ls -l /tmp | wc -l", "Echo done_now"]
ANSWERS = ["find . -name '*.py'", "ls /tmp", ""]


def test_by_hand():
    """The longest common subsequences have 3, 2 and 0 words, of 3, 5 and 3 in the references."""
    scores = answer_scores(ANSWERS, REFERENCES)
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["rouge_l"] == pytest.approx((1 + 2 * (2 / 2) * (2 / 5) / (2 / 2 + 2 / 5) + 0) / 3)


def test_english_scores_are_those_of_the_libraries():
    scores = answer_scores(ANSWERS, REFERENCES)
    rouge = RougeScorer(["rougeL"])
    expected = [rouge.score(*pair)["rougeL"].fmeasure for pair in zip(REFERENCES, ANSWERS, strict=True)]
    assert scores["rouge_l"] == pytest.approx(sum(expected) / 3)
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(ANSWERS, [REFERENCES]).score)
    assert 0 < scores["bleu"] < 100


def test_words_of_other_alphabets_count():
    assert answer_scores(["Привет, мир"], ["привет мир!"])["rouge_l"] == 1


def test_equal_answers_have_the_best_scores():
    best = {"exact_match": 1, "rouge_l": 1, "bleu": 100}
    assert answer_scores(["a b c d"], ["a b c d"]) == pytest.approx(best)
    assert all(AnswerMetrics.higher_is_better[name] for name in best)
