"""The interface of a method, and base classes of methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from adapeft.choose.elements import choose_elements
from adapeft.choose.fewest import fewest
from adapeft.choose.knapsack import choose_groups
from adapeft.measure.groups import Groups
from adapeft.measure.low_rank.windows import matrices_of
from adapeft.measure.passes import Passes
from adapeft.measure.statistics import Statistics
from adapeft.methods.base.options import ValuedOptions
from adapeft.ranks import Ranks
from adapeft.sections.select import Select
from adapeft.servers import MAX_RANK
from adapeft.subset.subset import Subset
from solver import Greedy

Options = TypeVar("Options", bound=Select)
OptionsOfValued = TypeVar("OptionsOfValued", bound=ValuedOptions)


@dataclass(frozen=True)
class Plan(Generic[Options]):
    """Inputs of a choice from the run.

    Attributes:
        budget: number of elements, or of bytes if ``costs`` are given.
        reach: reach of the planned training.
        seed: random seed of draws.
        settings: ``select`` section of the config.
        costs: bytes of each group, int64 [K]; None counts elements.
    """

    budget: int
    reach: float
    seed: int
    settings: Options
    costs: np.ndarray | None = None

    @property
    def most_rows(self) -> int | None:
        """Largest number of rows of one matrix, because vLLM and SGLang serve them as LoRA of that rank; None: all."""
        return MAX_RANK if self.settings.servable else None


class Method(ABC, Generic[Options]):
    """A stateless method to find a subset.

    Attributes:
        options: class of the ``select`` section of a config for this method, which defines the method's name.
        family: none, random, rule, projection, first-order or second-order.
        summary: one-line description of the trained parameters.
        cost: cost of the choice, in passes over the calibration.
        source: paper of the method.
        default_warmup_steps: warm-up steps of the always-trained part if ``select.warmup_steps`` is ``auto``.
        is_budgeted: whether the shipped changes stay within ``select.budget``.
        adds_parameters: whether it trains added parameters instead of some of the candidates.
        measures_loss: whether its statistics depend on the loss, so that the loss must be the model's own.
        measures_examples: whether it needs the gradient of every single example instead of batches.
        scored: the only column of its statistics, if ``score`` computes it from the weights alone; None otherwise.
    """

    options: type[Options]
    family: str
    summary: str
    cost: str
    source: str
    default_warmup_steps: int = 0
    is_budgeted: bool = True
    adds_parameters: bool = False
    measures_loss: bool = True
    measures_examples: bool = False
    scored: str | None = None

    @property
    def name(self) -> str:
        """Name of the method in ``select.method``."""
        return self.options.tag()

    def check(self, groups: Groups, budget: int, settings: Options) -> None:
        """Raise ``AdapeftError`` if the method cannot choose from these groups within ``budget`` elements."""

    def window_rank(self, groups: Groups, settings: Options) -> int | None:
        """Return the rank of the windows through which ``groups`` are measured; None: their own gradients are."""
        return settings.window_rank(groups.num_total, is_quantized=groups.is_quantized)

    def samples_labels(self, settings: Options) -> bool:
        """Whether measuring needs gradients at labels that are sampled from the model."""
        return False

    @abstractmethod
    def measure(self, passes: Passes, groups: Groups, settings: Options) -> Statistics:
        """Return the statistics of the groups, without columns if the method measures nothing. Collective."""

    def score(self, weights: Tensor) -> Tensor:
        """Return the ``scored`` statistic of each of these pretrained weights, float32, elementwise for any shape."""
        raise NotImplementedError(f"{self.name} scores no weights")

    def statistics_bytes(self, settings: Options, num_micro: int) -> int:
        """Return the peak bytes that measuring keeps per element of the candidates, on the rank that holds it.

        Squares need the gradient of a whole batch, which is kept if it is summed over ``num_micro`` > 1 micro-batches.
        """
        return 0

    def drawing_bytes(self, groups: Groups, budget: int) -> int:
        """Return the bytes of the random draws with which the method chooses ``budget`` elements."""
        return 0

    @abstractmethod
    def choose(self, groups: Groups, statistics: Statistics, plan: Plan[Options], ranks: Ranks) -> Subset:
        """Choose the subset within the plan's budget, the same on every rank. Collective."""

    def choose_fewest(
        self, groups: Groups, statistics: Statistics, plan: Plan[Options], best: Subset, ranks: Ranks
    ) -> Subset:
        """Choose as few as have nearly the value of ``best``, the choice within the plan's budget. Collective."""
        return fewest(best, lambda budget: self.choose(groups, statistics, replace(plan, budget=budget), ranks))

    def group_values(self, statistics: Statistics, reach: float) -> np.ndarray | None:
        """Return the value of each group, float64 [K], or None if the method does not value groups."""
        return None

    def option_values(self, statistics: Statistics, reach: float) -> np.ndarray | None:
        """Return the value of each of ``statistics.options``, float64 [N], or None if the method has no options."""
        return None


class UnmeasuredMethod(Method[Options]):
    """A method that measures nothing."""

    cost = "nothing"
    measures_loss = False

    def window_rank(self, groups: Groups, settings: Options) -> int | None:
        # The thinnest window shows whether a parameter gets a gradient at all.
        return 1 if matrices_of(groups, 1) else None

    def measure(self, passes: Passes, groups: Groups, settings: Options) -> Statistics:
        return Statistics(groups, {})


class ValuedMethod(Method[OptionsOfValued]):
    """A method that values every group or element and chooses the most valuable ones within the budget."""

    @abstractmethod
    def value(self, columns: dict[str, Tensor], reach: float) -> Tensor:
        """Return the value of each group or element from its statistics, elementwise for any shape."""

    def choose(self, groups: Groups, statistics: Statistics, plan: Plan[OptionsOfValued], ranks: Ranks) -> Subset:
        if groups.granularity == "element":
            return choose_elements(
                groups,
                statistics.elements,
                lambda columns: self.value(columns, plan.reach),
                plan.budget,
                ranks,
                by_tensor=plan.settings.scope == "tensor",
            )
        solver = Greedy() if plan.settings.solver == "greedy" else None
        values = self.group_values(statistics, plan.reach)
        return choose_groups(groups, values, plan.budget, solver, plan.costs, most_rows=plan.most_rows)

    def group_values(self, statistics: Statistics, reach: float) -> np.ndarray:
        return self.values(statistics.columns, reach)

    def values(self, columns: Mapping[str, np.ndarray], reach: float) -> np.ndarray:
        """Return ``value`` of NumPy columns."""
        return self.value({name: torch.from_numpy(column.copy()) for name, column in columns.items()}, reach).numpy()
