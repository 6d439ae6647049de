r"""Memory and traffic per device for each ZeRO stage, estimated before anything is loaded.

The formulas are those of ZeRO (Rajbhandari et al. 2020) for N workers, plus what DeepSpeed 0.19 adds: float32 master
weights at every stage except 0, a bucket of gradients being reduced, and at stage 3 the parameters that stay whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace

from adapeft.measure.shards.arriving import BUCKET

FLOAT32 = 4
"""Bytes per element of each Adam moment, master weight and statistic."""
INDEX = 8
"""Bytes per index of an element or row; every worker holds the indices."""


@dataclass(frozen=True)
class Zero:
    """How DeepSpeed partitions a model over its workers.

    Attributes:
        stage: ZeRO stage, 0 to 3.
        workers: number of workers, N.
        persistence_threshold: number of elements up to which stage 3 keeps a parameter whole on every worker.
        reduce_bucket: maximum number of gradient elements that are reduced at once.
        live: maximum number of elements that stage 3 keeps gathered at once, unless one parameter is larger.
        offload: where stage 3 keeps the weights that are not in use: ``none`` (on the device), ``cpu`` or
            ``nvme``.
        on_cpu: whether the workers compute on CPUs, where gloo gathers into a copy.
    """

    stage: int
    workers: int
    persistence_threshold: int
    reduce_bucket: int
    live: int
    offload: str = "none"
    on_cpu: bool = False


@dataclass(frozen=True)
class Pass:
    """Peak bytes, without the weights, of the forward and backward pass of one micro-batch.

    Attributes:
        activations: peak without the gradients that end up in ``.grad``.
        with_gradients: peak including these gradients, which are allocated one after the other.
    """

    activations: int
    with_gradients: int


@dataclass(frozen=True)
class Load:
    """Memory-relevant sizes of one stage of a run.

    Attributes:
        sizes: number of elements of each parameter that is not quantized, including leaves.
        element_bytes: bytes per element of these.
        num_trained: number of elements that get gradients.
        num_stepped: number of trained elements that the optimizer steps.
        num_measured: number of elements whose gradients are computed without an engine that trains them: each is summed
            over the workers and freed before the next one is computed, and ``passes`` includes the largest.
        num_warmed: number of measured elements that AdamW steps, each on one worker.
        passes: peak memory of one micro-batch.
        packed: bytes of the quantized weights.
        whole: bytes of weights that each worker holds, whatever the stage.
        num_micro: micro-batches per optimizer step.
        statistics: bytes of statistics that each worker keeps.
        base: bytes of pretrained values kept next to tensors that are trained whole; stage 3 divides them.
        process: bytes of a process that has loaded its libraries and data.
        freed: bytes that the allocator keeps in holes at the peak.
        heap: bytes of activations, gradients and holes that the allocator keeps while the optimizer steps.
        unknown: reason why ``passes`` is only a bound; None if it was counted.
    """

    sizes: Sequence[int]
    element_bytes: int
    num_trained: int
    num_stepped: int
    passes: Pass
    packed: int = 0
    whole: int = 0
    num_micro: int = 1
    num_measured: int = 0
    num_warmed: int = 0
    statistics: int = 0
    base: int = 0
    process: int = 0
    freed: int = 0
    heap: int = 0
    unknown: str | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step, by part."""

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
        return sum(astuple(self))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by the name of the part."""
        return dict(zip((field.name for field in fields(self)), astuple(self), strict=True))

    @property
    def biggest(self) -> str:
        """Name of the largest part that depends on the config."""
        parts = {name: size for name, size in self.parts.items() if name not in ("allocator", "process")}
        return max(parts, key=lambda name: parts[name])


def memory(load: Load, zero: Zero) -> Memory:
    """Return the larger of the two ``moments``."""
    return max(moments(load, zero), key=lambda moment: moment.total)


def moments(load: Load, zero: Zero) -> tuple[Memory, Memory]:
    """Return the memory at the peak of the backward pass, and in the step: no activations, but copied gradients."""
    backward = Memory(
        weights=_weights(load, zero) + _gathered(load, zero) + _packed(load, zero) + load.whole,
        gradients=_gradients(load, zero),
        optimizer=_optimizer(load, zero),
        statistics=load.statistics,
        activations=load.passes.activations,
        buffers=(share(load.base, zero) if zero.stage == 3 else load.base) + _bucket(load, zero),
        allocator=load.freed,
        process=load.process,
    )
    stepping = replace(
        backward,
        gradients=_all_gradients(load, zero),
        activations=0,
        buffers=backward.buffers + _step(load, zero),
        # Stage 3 has moved the gradients to buffers of their own; at other stages they are among what is kept.
        allocator=load.heap if zero.stage == 3 else max(0, load.heap - _all_gradients(load, zero)),
    )
    return backward, stepping


def bytes_per_element(zero: Zero, element_bytes: int, *, has_leaf: bool, keeps_base: bool) -> tuple[float, float]:
    """Return the additional bytes at each of the ``moments`` for one more trained element.

    Args:
        zero: how the model is partitioned.
        element_bytes: bytes per element of the weights.
        has_leaf: whether the element is trained in a leaf next to the weight, which is one more weight.
        keeps_base: whether its pretrained value is kept on the device.
    """
    many = 10**9  # large enough that rounding to whole bytes is negligible
    load = Load(
        sizes=[many] * has_leaf,
        element_bytes=element_bytes,
        num_trained=many,
        num_stepped=many,
        passes=Pass(0, 0),
        num_micro=2,  # any number above 1: all gradients may exist when activations peak
        base=FLOAT32 * many * keeps_base,
    )
    # They stand for small leaves, which stage 3 keeps whole, and for gradients that fit into one bucket.
    backward, stepping = moments(load, replace(zero, reduce_bucket=many, persistence_threshold=many))
    return backward.total / many, stepping.total / many


def traffic(load: Load, zero: Zero) -> dict[str, int]:
    """Return the bytes that a worker sends in one optimizer step, by operation (Rajbhandari et al. 2020, section 7).

    A ring moves (N - 1) / N of a tensor's bytes for an all-gather or a reduce-scatter, and twice that for an
    all-reduce, which DeepSpeed uses at stages 1 and 2 where the paper only needs a reduce-scatter. Measuring
    all-reduces the gradients of every micro-batch in float32.
    """
    ring = (zero.workers - 1) / zero.workers
    gradients = load.num_trained * load.element_bytes
    measured = 2 * load.num_measured * FLOAT32 * load.num_micro
    moved: dict[str, float]
    if zero.stage < 3:
        moved = {
            "gradients": measured + 2 * gradients,
            "weights": load.num_stepped * load.element_bytes if zero.stage else 0,
        }
    else:
        divided = _divided(load, zero)
        # If all partitioned parameters fit within ``zero.live``, the backward pass need not gather them again.
        num_gathers = load.num_micro * (1 if divided + load.packed <= zero.live else 2)
        kept = min(load.num_stepped, sum(load.sizes) - divided)  # parameters that stay whole and were stepped
        moved = {
            "gradients": measured + gradients * load.num_micro,
            "weights": (divided * load.element_bytes + load.packed) * num_gathers + kept * load.element_bytes,
        }
    return {name: int(size * ring) for name, size in moved.items()}


def share(size: int, zero: Zero) -> int:
    """Return the size of one worker's partition of ``size`` elements or bytes, rounded up."""
    return -(-size // zero.workers)


def offloaded(load: Load, zero: Zero) -> int:
    """Return the bytes of a worker's weights that are kept away from its device."""
    return share(sum(load.sizes), zero) * load.element_bytes if _is_offloaded(zero) else 0


def _is_offloaded(zero: Zero) -> bool:
    return zero.stage == 3 and zero.offload != "none"


def _weights(load: Load, zero: Zero) -> int:
    total = sum(load.sizes)
    if zero.stage < 3 or (zero.workers == 1 and not _is_offloaded(zero)):
        return total * load.element_bytes
    kept = 0 if _is_offloaded(zero) else share(total, zero)
    return (kept + total - _divided(load, zero)) * load.element_bytes


def _divided(load: Load, zero: Zero) -> int:
    """Return the number of elements that stage 3 gathers on demand; the others stay whole on every worker."""
    if zero.stage < 3 or (zero.workers == 1 and not _is_offloaded(zero)):
        return 0
    return sum(size for size in load.sizes if size > zero.persistence_threshold)


def _packed(load: Load, zero: Zero) -> int:
    """Return the bytes of quantized weights: at stage 3 with several workers, all of them and a share.

    bitsandbytes' autograd function of a 4-bit layer keeps the gathered codes until its backward pass, also in a layer
    with gradient checkpointing.
    """
    divided = zero.stage == 3 and zero.workers > 1
    return load.packed + (share(load.packed, zero) if divided else 0)


def _gathered(load: Load, zero: Zero) -> int:
    divided = _divided(load, zero)
    if not divided:
        return 0
    copied = max(load.sizes) if zero.on_cpu and zero.workers > 1 else 0
    return (min(divided, max(zero.live, *load.sizes)) + copied) * load.element_bytes


def _gradients(load: Load, zero: Zero) -> int:
    if zero.stage == 0 and load.num_micro == 1:
        return load.passes.with_gradients - load.passes.activations
    return _all_gradients(load, zero)


def _all_gradients(load: Load, zero: Zero) -> int:
    """Return a full copy per worker, except at stage 3: below it DeepSpeed partitions gradients only while stepping."""
    return (share(load.num_trained, zero) if zero.stage == 3 else load.num_trained) * load.element_bytes


def _optimizer(load: Load, zero: Zero) -> int:
    copies = FLOAT32 if load.element_bytes < FLOAT32 else 0
    warmed = share((2 * FLOAT32 + copies) * load.num_warmed, zero)
    moments = 2 * FLOAT32 * load.num_stepped
    if zero.stage == 0:
        return warmed + moments + copies * load.num_trained
    return warmed + share(moments + FLOAT32 * load.num_trained, zero)


def _bucket(load: Load, zero: Zero) -> int:
    of_workers = FLOAT32 * min(load.num_measured, BUCKET) if zero.workers > 1 else 0
    return of_workers + (min(load.num_trained, zero.reduce_bucket) * load.element_bytes if zero.stage else 0)


def _step(load: Load, zero: Zero) -> int:
    """Return the bytes of the gradients' copies: flat for the reduction, then float32 next to Adam's temporaries."""
    flat = min(load.num_trained, zero.reduce_bucket) * load.element_bytes if zero.workers > 1 else 0
    if zero.stage == 0:
        return flat
    if zero.stage == 3 and flat:
        flat += share(load.num_trained, zero) * load.element_bytes  # the reduced gradients
    return max(flat, share(FLOAT32 * (load.num_trained + 2 * load.num_stepped), zero))
