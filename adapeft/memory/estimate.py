r"""Memory and traffic of a device, known before anything is loaded: what an engine holds of a model, stage by stage.

The formulas are those of ZeRO (Rajbhandari et al. 2020) for N workers, with what DeepSpeed 0.19 adds: float32 master
values at every stage but 0, a bucket of gradients being reduced, and at stage 3 the parameters that stay whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace

FLOAT32 = 4
"""Bytes of Adam's two moments each, of a master value, of a statistic."""
INDEX = 8
"""Bytes of the position of an element or of a row, which every worker holds."""


@dataclass(frozen=True)
class Zero:
    """How an engine divides a model over its workers.

    Attributes:
        stage: of ZeRO, 0 to 3.
        workers: N.
        persistence_threshold: elements up to which stage 3 keeps a parameter whole on every worker.
        reduce_bucket: elements of gradients that are reduced at once, at most.
        live: elements that stage 3 keeps gathered at once, at most.
    """

    stage: int
    workers: int
    persistence_threshold: int
    reduce_bucket: int
    live: int


@dataclass(frozen=True)
class Pass:
    """Bytes that live at once beside weights, at the worst moment of a micro-batch's forward and backward pass.

    Attributes:
        activations: without the gradients that end up in ``.grad``.
        with_gradients: with them, as they come into being one after the other.
    """

    activations: int
    with_gradients: int


@dataclass(frozen=True)
class Load:
    """What one stage of a run asks of an engine.

    Attributes:
        sizes: elements of every parameter, leaves and all.
        element_bytes: of the weights' type.
        num_trained: elements that get gradients.
        num_stepped: elements of these that the optimizer steps.
        passes: of a micro-batch.
        num_micro: micro-batches before a step.
        statistics: bytes a worker keeps of what it measures.
        base: bytes of pretrained values kept beside those that are trained whole.
        process: bytes of a process that has loaded its libraries and data.
        freed: what the allocator keeps of the activations when they are freed, as a part of them.
        unknown: why ``passes`` are only a bound; None where they were counted.
    """

    sizes: Sequence[int]
    element_bytes: int
    num_trained: int
    num_stepped: int
    passes: Pass
    num_micro: int = 1
    statistics: int = 0
    base: int = 0
    process: int = 0
    freed: float = 0.0
    unknown: str | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the worst moment of a step, by part."""

    weights: int
    gradients: int
    optimizer: int
    statistics: int
    activations: int
    buffers: int
    allocator: int
    process: int

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(astuple(self))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by the name of the part."""
        return dict(zip((field.name for field in fields(self)), astuple(self), strict=True))

    @property
    def biggest(self) -> str:
        """The part that there is most of, of those that a config decides."""
        parts = {name: size for name, size in self.parts.items() if name not in ("allocator", "process")}
        return max(parts, key=lambda name: parts[name])


def memory(load: Load, zero: Zero) -> Memory:
    """At the worst of the moments."""
    return max(moments(load, zero), key=lambda moment: moment.total)


def moments(load: Load, zero: Zero) -> tuple[Memory, Memory]:
    """The backward pass at its worst, and the step, when activations are gone and gradients are copied."""
    backward = Memory(
        weights=_weights(load, zero) + _gathered(load, zero),
        gradients=_gradients(load, zero),
        optimizer=_optimizer(load, zero),
        statistics=load.statistics,
        activations=load.passes.activations,
        buffers=load.base + _bucket(load, zero),
        allocator=int(load.freed * load.passes.activations),
        process=load.process,
    )
    stepping = replace(
        backward,
        gradients=_all_gradients(load, zero),
        activations=0,
        buffers=backward.buffers + _step(load, zero),
    )
    return backward, stepping


def bytes_per_element(zero: Zero, element_bytes: int, *, has_leaf: bool, keeps_base: bool) -> tuple[float, float]:
    """What each of the ``moments`` holds more for one more trained element.

    Args:
        zero: how the engine divides.
        element_bytes: of the weights' type.
        has_leaf: whether the element trains in a leaf beside the weight, which is one more weight.
        keeps_base: whether its pretrained value is kept on the device.
    """
    many = 10**9  # so that no rounding to whole bytes shows
    load = Load(
        sizes=[many] * has_leaf,
        element_bytes=element_bytes,
        num_trained=many,
        num_stepped=many,
        passes=Pass(0, 0),
        num_micro=2,  # whatever the number: all gradients may be there when activations are most
        base=FLOAT32 * many * keeps_base,
    )
    # The many stand for small leaves, which stage 3 keeps whole, and for gradients that one bucket holds.
    backward, stepping = moments(load, replace(zero, reduce_bucket=many, persistence_threshold=many))
    return backward.total / many, stepping.total / many


def traffic(load: Load, zero: Zero) -> dict[str, int]:
    """Bytes that a worker sends in one optimizer step, by operation (Rajbhandari et al. 2020, section 7).

    A ring moves (N - 1) / N of a tensor's bytes for a gather or a scatter, and twice that for an all-reduce, which is
    what DeepSpeed does at stages 1 and 2 where the paper only scatters.
    """
    ring = (zero.workers - 1) / zero.workers
    gradients = load.num_trained * load.element_bytes
    moved: dict[str, float]
    if zero.stage < 3:
        moved = {"gradients": 2 * gradients, "weights": load.num_stepped * load.element_bytes if zero.stage else 0}
    else:
        divided = _divided(load, zero)
        # What fits among the gathered parameters is still there when the backward pass wants it.
        num_gathers = load.num_micro * (1 if divided <= zero.live else 2)
        kept = min(load.num_stepped, sum(load.sizes) - divided)  # of those that stay whole, the ones that have moved
        moved = {
            "gradients": gradients * load.num_micro,
            "weights": (divided * num_gathers + kept) * load.element_bytes,
        }
    return {name: int(size * ring) for name, size in moved.items()}


def share(size: int, zero: Zero) -> int:
    """This worker's part of what is divided at every stage."""
    return -(-size // zero.workers)


def _weights(load: Load, zero: Zero) -> int:
    total = sum(load.sizes)
    if zero.stage < 3 or zero.workers == 1:
        return total * load.element_bytes
    return (share(total, zero) + total - _divided(load, zero)) * load.element_bytes


def _divided(load: Load, zero: Zero) -> int:
    """Elements of the parameters that stage 3 gathers when they are needed; the others stay whole on every worker."""
    if zero.stage < 3 or zero.workers == 1:
        return 0
    return sum(size for size in load.sizes if size > zero.persistence_threshold)


def _gathered(load: Load, zero: Zero) -> int:
    return min(_divided(load, zero), zero.live) * load.element_bytes


def _gradients(load: Load, zero: Zero) -> int:
    if zero.stage == 0 and load.num_micro == 1:
        return load.passes.with_gradients - load.passes.activations
    return _all_gradients(load, zero)


def _all_gradients(load: Load, zero: Zero) -> int:
    """A whole copy on every worker but at stage 3: DeepSpeed divides the others' only while it steps."""
    return (share(load.num_trained, zero) if zero.stage == 3 else load.num_trained) * load.element_bytes


def _optimizer(load: Load, zero: Zero) -> int:
    moments = 2 * FLOAT32 * load.num_stepped
    if zero.stage == 0:
        return moments + (FLOAT32 * load.num_trained if load.element_bytes < FLOAT32 else 0)
    return share(moments + FLOAT32 * load.num_trained, zero)


def _bucket(load: Load, zero: Zero) -> int:
    return min(load.num_trained, zero.reduce_bucket) * load.element_bytes if zero.stage else 0


def _step(load: Load, zero: Zero) -> int:
    """What the gradients are copied to: flat to be reduced, then float32 beside Adam's temporaries."""
    flat = min(load.num_trained, zero.reduce_bucket) * load.element_bytes if zero.workers > 1 else 0
    if zero.stage == 0:
        return flat
    if zero.stage == 3 and flat:
        flat += share(load.num_trained, zero) * load.element_bytes  # what comes back
    return max(flat, share(FLOAT32 * (load.num_trained + 2 * load.num_stepped), zero))
