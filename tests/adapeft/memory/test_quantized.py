"""The counted pass of a quantized model against what PyTorch's allocator hands out in a real one."""

from __future__ import annotations

from itertools import accumulate

import pytest
from torch.profiler import ProfilerActivity, profile

from adapeft.memory.activations import count_pass, repeated_token
from adapeft.tasks.losses.cross_entropy import Classification
from tests.support.quantized import TYPES, load_quantized, make_wide

NUM_EXAMPLES, NUM_TOKENS = 16, 32


def prepare(model):
    """Train the embeddings, so that gradients pass through every layer."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("word_embeddings.weight"))
    model.train()


def peak(model) -> int:
    """Return the most bytes that a forward and backward pass holds at once on a CPU."""
    objective = Classification()
    batch = repeated_token(model.config, objective, NUM_EXAMPLES, NUM_TOKENS)
    for _ in range(2):  # the first pass of an 8-bit layer moves its scales
        model.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            objective.loss(model, batch).backward()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("kind", TYPES)
def test_activations_are_what_training_through_bitsandbytes_layers_holds(tmp_path, kind):
    """8-bit layers keep their input until the backward pass; both types hold a dense weight for a moment."""
    model = load_quantized(make_wide, kind, tmp_path)
    prepare(model)
    counted = count_pass(
        model.config,
        "sequence-classification",
        prepare,
        Classification(),
        num_examples=NUM_EXAMPLES,
        num_tokens=NUM_TOKENS,
    )
    assert counted.packed
    assert counted.passes.with_gradients == pytest.approx(peak(model), rel=0.03)
