"""The interface of a method: how it measures, and how it values what it measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from adapeft.choose.elements import choose_elements
from adapeft.choose.knapsack import choose_groups
from adapeft.measure.groups import Groups
from adapeft.measure.passes import Passes
from adapeft.measure.statistics import Statistics
from adapeft.methods.base.options import ValuedOptions
from adapeft.ranks import Ranks
from adapeft.sections.select import Select
from adapeft.subset.subset import Subset
from solver import Greedy

Options = TypeVar("Options", bound=Select)
OptionsOfValued = TypeVar("OptionsOfValued", bound=ValuedOptions)


@dataclass(frozen=True)
class Plan(Generic[Options]):
    """What choosing knows of the run: the budget, the reach of the training to come, the settings.

    The budget counts elements; or bytes, where ``costs`` are there: int64 [K], the groups' own.
    """

    budget: int
    reach: float
    seed: int
    settings: Options
    costs: np.ndarray | None = None


class Method(ABC, Generic[Options]):
    """A way to find the subset. One folder each; stateless.

    Attributes:
        options: the section ``select`` of a config for this method, which names it.
        family: none, random, rule, projection or second-order.
        summary: what it trains, in a line.
        cost: what choosing costs, in passes over the calibration.
        source: where it comes from.
        default_warmup_steps: warm-up of the always-trained part when ``select.warmup_steps`` is ``auto``.
        is_budgeted: whether what is shipped stays within ``select.budget``.
        adds_parameters: whether it trains parameters beside the candidates, not some of these.
        measures_loss: whether it measures anything of the loss, so that the loss must be the model's own.
        measures_examples: whether it wants the gradient of every single example, not of batches.
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

    @property
    def name(self) -> str:
        """As in ``select.method``."""
        return self.options.tag()

    def check(self, groups: Groups, budget: int, settings: Options) -> None:
        """Raises ``AdapeftError`` when the method cannot serve these groups within ``budget`` elements."""

    @abstractmethod
    def measure(self, passes: Passes, groups: Groups, settings: Options) -> Statistics:
        """Statistics of the groups, without columns when the method measures nothing. Collective."""

    def statistics_bytes(self, settings: Options) -> int:
        """Bytes that measuring keeps for each candidate's element, on the rank that has it, at most."""
        return 0

    @abstractmethod
    def choose(self, groups: Groups, statistics: Statistics, plan: Plan[Options], ranks: Ranks) -> Subset:
        """The subset under the plan's budget, the same on every rank. Collective."""

    def group_values(self, statistics: Statistics, reach: float) -> np.ndarray | None:
        """float64 [K]: the value that choosing gives each group, None where groups have none."""
        return None

    def option_values(self, statistics: Statistics, reach: float) -> np.ndarray | None:
        """float64 [N]: the value that choosing gives each of ``statistics.options``, None where they have none."""
        return None


class UnmeasuredMethod(Method[Options]):
    """A method that measures nothing."""

    cost = "nothing"
    measures_loss = False

    def measure(self, passes: Passes, groups: Groups, settings: Options) -> Statistics:
        return Statistics(groups, {})


class ValuedMethod(Method[OptionsOfValued]):
    """A method that gives every group or element a value and takes the most valuable under the budget."""

    @abstractmethod
    def value(self, columns: dict[str, Tensor], reach: float) -> Tensor:
        """Value of each group or element from its statistics, elementwise for any shape."""

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
        return choose_groups(groups, self.group_values(statistics, plan.reach), plan.budget, solver, plan.costs)

    def group_values(self, statistics: Statistics, reach: float) -> np.ndarray:
        return self.values(statistics.columns, reach)

    def values(self, columns: Mapping[str, np.ndarray], reach: float) -> np.ndarray:
        """``value`` of columns in numpy."""
        return self.value({name: torch.from_numpy(column.copy()) for name, column in columns.items()}, reach).numpy()
