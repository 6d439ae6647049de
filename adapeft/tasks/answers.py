"""Scores of generated answers against those of the data, computed on all of them at once."""

from __future__ import annotations

import re
from collections.abc import Sequence

from adapeft.tasks.causal_lm import TokenMetrics

_WORD = re.compile(r"[^\W_]+")


class AnswerMetrics(TokenMetrics):
    """Metrics of next-token prediction and, with ``data.generate``, of generated answers."""

    of = "tasks with answers"
    higher_is_better = {**TokenMetrics.higher_is_better, "exact_match": True, "rouge_l": True, "bleu": True}


def answer_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return the share of exact matches, the mean F-measure of ROUGE-L (both 0 to 1), and the corpus's BLEU (0 to 100).

    Computed by rouge-score, on lowercase words, and by sacrebleu, on its tokens ``13a``.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    matches = [answer == reference for answer, reference in zip(answers, references, strict=True)]
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    rouge = [scorer.score(*pair)["rougeL"].fmeasure for pair in zip(references, answers, strict=True)]
    return {
        "exact_match": sum(matches) / len(matches),
        "rouge_l": sum(rouge) / len(rouge),
        "bleu": BLEU().corpus_score(list(answers), [list(references)]).score,
    }


class _Words:
    """Words in lower case as of rouge-score, which would drop all letters that are not English."""

    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.lower())
