"""Inference of the objective from a model and its labels, without a config."""

from __future__ import annotations

from torch import Tensor, nn

from adapeft.errors import AdapeftError
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
    "classes [n], targets [n] (or [n, K] with config.problem_type = 'regression'), classes of tokens [n, T], and the "
    "tokens [n, T] of a causal or masked language model or an encoder-decoder"
)
_CLASSIFIERS = {
    "ForSequenceClassification",
    "ForImageClassification",
    "ForVideoClassification",
    "ForAudioClassification",
}
_LANGUAGE_MODELS = {"ForCausalLM", "ForConditionalGeneration"}
_OF_TOKENS, _OF_MASKS = "ForTokenClassification", "ForMaskedLM"


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
    if loss is not None and loss not in _CLASSIFIERS | _LANGUAGE_MODELS | {_OF_TOKENS, _OF_MASKS}:
        raise AdapeftError(f"a model with the loss {loss!r} cannot be measured: supported are {_KNOWN}.")
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
