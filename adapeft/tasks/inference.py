"""The objective of a model and its labels without a config: inferred, or by the name of a task."""

from __future__ import annotations

from torch import Tensor, nn

from adapeft.data.description import DataDescription
from adapeft.errors import AdapeftError, did_you_mean
from adapeft.tasks.losses.answer_spans import AnswerSpans
from adapeft.tasks.losses.cross_entropy import (
    Classification,
    MaskedTokens,
    NextToken,
    SequenceToSequence,
    TokenClasses,
)
from adapeft.tasks.losses.objective import Objective
from adapeft.tasks.losses.squared_error import Regression
from adapeft.tasks.registry import TASKS

_KNOWN = (
    "classes [n], targets [n] (or [n, K] with config.problem_type = 'regression'), classes of tokens [n, T], the "
    "tokens [n, T] of a causal or masked language model or an encoder-decoder, and start_positions and end_positions "
    "[n] of question answering"
)
_CLASSIFIERS = {
    "ForSequenceClassification",
    "ForImageClassification",
    "ForVideoClassification",
    "ForAudioClassification",
}
_LANGUAGE_MODELS = {"ForCausalLM", "ForConditionalGeneration"}
_OF_TOKENS, _OF_MASKS, _OF_SPANS = "ForTokenClassification", "ForMaskedLM", "ForQuestionAnswering"


def infer_objective(model: nn.Module, labels: Tensor) -> Objective:
    """Return the objective that transformers would use for ``labels`` of this shape and dtype.

    It is derived from the model's config and class; ``check_own_loss`` compares it with the model's own loss.

    Raises:
        AdapeftError: transformers would use an unsupported loss.
    """
    loss = getattr(model, "loss_type", None)
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    is_encoder_decoder = getattr(config, "is_encoder_decoder", False)
    if loss is not None and loss not in _CLASSIFIERS | _LANGUAGE_MODELS | {_OF_TOKENS, _OF_MASKS, _OF_SPANS}:
        raise AdapeftError(
            f"the loss {loss!r} of this model is unknown: known are those of {_KNOWN}. Say in adapeft.select which one "
            f"to measure: loss= with the name of a task or a function."
        )
    if loss == _OF_SPANS:
        return _of_spans(labels)
    for task in TASKS.values():
        if (objective := task.objective_of(problem, labels)) is not None:
            return objective
    if problem == "multi_label_classification":
        raise AdapeftError(
            f"config.problem_type = {problem!r}: labels have shape {list(labels.shape)} and type "
            f"{str(labels.dtype).removeprefix('torch.')}, but must be floats [n, C], one per example and class."
        )
    if loss == _OF_TOKENS and labels.ndim == 2 and not labels.is_floating_point():
        return TokenClasses()
    one_output = getattr(config, "num_labels", None) == 1
    if labels.ndim == 2 and labels.is_floating_point() and (one_output or problem == "regression"):
        return Regression()
    if labels.ndim == 2 and not labels.is_floating_point() and loss not in {*_CLASSIFIERS, _OF_TOKENS}:
        if is_encoder_decoder:  # T5Gemma's decoder has the loss type of masked language models
            return SequenceToSequence()
        return MaskedTokens() if loss == _OF_MASKS else NextToken()
    if labels.ndim != 1:
        kind = str(labels.dtype).removeprefix("torch.")
        raise AdapeftError(
            f"labels of shape {list(labels.shape)} and type {kind} are not supported: supported are {_KNOWN}."
        )
    # As in transformers: one output means regression, for any dtype of the targets.
    return Regression() if labels.is_floating_point() or one_output else Classification()


def objective_named(name: str, model: nn.Module, labels: Tensor) -> Objective:
    """Return the objective of the task ``name`` for labels of this dtype.

    Raises:
        AdapeftError: there is no such task.
    """
    if name not in TASKS:
        raise AdapeftError(
            f"loss = {name!r} is not a task.{did_you_mean(name, TASKS)} Give {', '.join(TASKS)}, or a function of the "
            f"model and a batch."
        )
    num_labels = getattr(getattr(model, "config", None), "num_labels", 0)
    problem = "regression" if labels.is_floating_point() or num_labels == 1 else None
    return TASKS[name].objective(DataDescription(0, 0, None, problem, num_labels))


def _of_spans(labels: Tensor) -> Objective:
    if labels.ndim != 2 or labels.shape[1] != 2 or labels.is_floating_point():
        raise AdapeftError(
            f"labels of shape {list(labels.shape)} do not fit a model for question answering, which needs "
            f"start_positions and end_positions, integers [n], in every batch."
        )
    return AnswerSpans()
