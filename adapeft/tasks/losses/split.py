"""Language models split after their body: hidden states first, then logits of a few positions at a time.

What follows the body (the output layer, soft-capping, a scale) is not imitated: the model's own forward runs with the
body replaced by a stand-in that returns the hidden states of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from adapeft.tasks.losses.pieces import Tail, num_pieces

Result = TypeVar("Result", Tensor, tuple[Tensor, ...])

_NUM_EXAMPLES, _NUM_TOKENS, _NUM_PIECES = 2, 8, 3
"""Size of the batch on which a split is tried."""


@dataclass(frozen=True)
class Split:
    """A model's forward pass, split after its body.

    Attributes:
        body: path of the module that computes the hidden states.
        before: paths of modules that run before it and outside of it, such as T5's encoder.
    """

    body: str
    before: tuple[str, ...] = ()

    def run(self, model: nn.Module, inputs: Mapping[str, Any], rest: Callable[[Tensor, Tail], Result]) -> Result:
        """Return ``rest(hidden states [n, T, H], tail)``, called within the forward pass of ``model``.

        Wrappers such as engines see one forward pass whose output is that of ``rest``. The tail may be called later, to
        recompute a piece in the backward pass.

        Args:
            model: the model that was split, or an engine around it.
            inputs: keyword arguments of its forward.
            rest: function of the hidden states.
        """
        inner = unwrapped(model)
        forward = inner.forward

        def split_forward(**arguments: Any) -> Result:
            outputs = self._outputs(inner, forward, arguments)

            def tail(states: Tensor) -> Tensor:
                given = {**outputs, self.body: _with_states(outputs[self.body], states.unsqueeze(0))}
                stand_ins = {path: _Given(inner.get_submodule(path), output) for path, output in given.items()}
                with _replaced(inner, stand_ins):
                    logits: Tensor = forward(**arguments).logits
                return logits.squeeze(0)

            states = outputs[self.body].last_hidden_state
            outputs[self.body] = _with_states(outputs[self.body], states.new_empty(0))  # frees them after the pieces
            return rest(states, tail)

        own = inner.__dict__.get("forward")
        inner.__dict__["forward"] = split_forward
        try:
            result: Result = model(**inputs)
            return result
        finally:
            if own is None:
                del inner.__dict__["forward"]
            else:
                inner.__dict__["forward"] = own

    def _outputs(self, inner: nn.Module, forward: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the outputs of the body and the modules before it, by path."""
        outputs: dict[str, Any] = {}
        with_gradients = torch.is_grad_enabled()
        recorders = {
            path: _Recorder(inner.get_submodule(path), path, outputs, is_last=path == self.body)
            for path in (*self.before, self.body)
        }
        try:
            with _replaced(inner, recorders):
                forward(**arguments)
        finally:
            torch.set_grad_enabled(with_gradients)
        return outputs


class _StandIn(nn.Module):
    """Takes the place of a module, whose attributes and parameters the model around it may still read."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class _Recorder(_StandIn):
    """Calls a module and records its output.

    The forward of the model around it has to be completed, although only the body is needed. What follows the body
    therefore runs on the first position alone, and without gradients, as the result is not used.
    """

    def __init__(self, module: nn.Module, path: str, outputs: dict[str, Any], *, is_last: bool) -> None:
        super().__init__(module)
        self._path, self._outputs, self._is_last = path, outputs, is_last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.module(*args, **kwargs)
        self._outputs[self._path] = output
        if not self._is_last:
            return output
        torch.set_grad_enabled(False)
        # Contiguous, because torch multiplies a strided batch by a frozen weight that it has copied for every example:
        # 432 MB and 0.7 s for SmolLM2's output layer and a batch of 8, instead of 1 MB and 5 ms.
        return _with_states(output, output.last_hidden_state[:, :1].contiguous())


class _Given(_StandIn):
    """Returns a given output."""

    def __init__(self, module: nn.Module, output: Any) -> None:
        super().__init__(module)
        self._output = (output,)  # a tuple, so that nn.Module does not look at it

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._output[0]


def split_of(model: nn.Module, num_positions: int) -> tuple[Split, int] | None:
    """Return how the model is split and the number of pieces; None if its logits fit into one piece, or it has no body.

    The first call for a model tries it out on a few tokens, which is collective under ZeRO-3.

    Args:
        model: model, or an engine around it.
        num_positions: number of positions; under ZeRO-3 the same on all ranks, which must call the tail equally often.
    """
    inner, pieces = unwrapped(model), pieces_of(model, num_positions)
    if pieces == 1:
        return None
    assert isinstance(inner, PreTrainedModel)
    if inner not in _SPLITS:
        _SPLITS[inner] = _tried(inner)
    split = _SPLITS[inner]
    return None if split is None else (split, pieces)


def pieces_of(model: nn.Module, num_positions: int) -> int:
    """Return the number of pieces in which the logits of a transformers model are computed if it can be split."""
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        return 1
    return num_pieces(num_positions, getattr(inner.config.get_text_config(decoder=True), "vocab_size", 0))


_SPLITS: WeakKeyDictionary[nn.Module, Split | None] = WeakKeyDictionary()


def with_decoder_inputs(model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> dict[str, Any]:
    """Return the inputs of an encoder-decoder with those of its decoder, which it would derive from the labels."""
    if "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs:
        return dict(inputs)
    prepare: Any = unwrapped(model).prepare_decoder_input_ids_from_labels
    return {**inputs, "decoder_input_ids": prepare(labels)}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside an engine or DistributedDataParallel."""
    inner: nn.Module = getattr(model, "module", model)
    return inner


@torch.no_grad()
def _tried(model: PreTrainedModel) -> Split | None:
    """Return how the model is split; None if its logits cannot be computed from hidden states by position.

    Compares the logits of a small batch, the same on all ranks, with those of a piece at a time.
    """
    if model._compiled_call_impl is not None:  # compiled in place
        return None
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        inputs, parts = _inputs(model), _parts(model)
        ids = inputs["input_ids"]
        is_encoder_decoder = model.config.is_encoder_decoder
        outputs: dict[str, list[Any]] = {path: [] for path in parts}
        hooks = [module.register_forward_hook(partial(_note, outputs[path])) for path, module in parts.items()]
        try:
            logits = model(**inputs, **({"labels": ids} if is_encoder_decoder else {})).logits
        finally:
            for hook in hooks:
                hook.remove()
        split = _split_after(outputs)
        if is_encoder_decoder:
            inputs = with_decoder_inputs(model, inputs, ids)
        return split if split is not None and _gives(split, model, inputs, logits) else None
    except Exception:  # the code of any model, on inputs that it may not expect
        return None
    finally:
        for module, mode in modes.items():
            module.training = mode


def _inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a small batch, the same on all ranks, whose last example is padded."""
    num_outputs = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(3, 3 + _NUM_EXAMPLES * _NUM_TOKENS, device=next(model.parameters()).device) % num_outputs
    ids = ids.view(_NUM_EXAMPLES, _NUM_TOKENS)
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _parts(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the modules that may be the body, outermost first, and the encoder, by path."""
    paths = {module: path for path, module in model.named_modules() if path}
    base: Any = model.base_model
    parts = [base, model.get_decoder(), base.get_decoder()]
    if model.config.is_encoder_decoder:
        parts.append(model.get_encoder())
    return {paths[part]: part for part in parts if part in paths}


def _note(outputs: list[Any], module: nn.Module, args: Any, output: Any) -> None:
    outputs.append(output)


def _split_after(outputs: Mapping[str, list[Any]]) -> Split | None:
    """Return the split after the first part that ran once and returned a hidden state for every position."""
    once = {path: found[0] for path, found in outputs.items() if len(found) == 1}
    for body, output in once.items():
        states = getattr(output, "last_hidden_state", None)
        if isinstance(states, Tensor) and states.shape[:-1] == (_NUM_EXAMPLES, _NUM_TOKENS):
            return Split(body, tuple(path for path in once if not _is_nested(path, body)))
    return None


def _is_nested(path: str, other: str) -> bool:
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


def _gives(split: Split, model: PreTrainedModel, inputs: Mapping[str, Tensor], logits: Tensor) -> bool:
    """Whether the split model computes these logits, from positions in another order and in pieces."""

    def reversed_in_pieces(states: Tensor, tail: Tail) -> Tensor:
        return torch.cat([tail(piece) for piece in states.flatten(0, 1).flip(0).tensor_split(_NUM_PIECES)])

    found, expected = split.run(model, inputs, reversed_in_pieces), logits.flatten(0, 1).flip(0)
    if isinstance(logits, FakeTensor) or found.shape != expected.shape:
        return found.shape == expected.shape
    tolerance = min(torch.finfo(logits.dtype).eps ** 0.5, 0.03)
    return bool((found - expected).norm() <= tolerance * expected.norm())


@contextmanager
def _replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace the modules at these paths."""
    own = {path: model.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            _place(model, path, module)
        yield
    finally:
        for path, module in own.items():
            _place(model, path, module)


def _place(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def _with_states(output: ModelOutput, states: Tensor) -> ModelOutput:
    """Return the body's output with other hidden states, and without a cache of keys and values."""
    kept = {name: value for name, value in output.items() if name != "past_key_values"}
    return type(output)(**{**kept, "last_hidden_state": states})
