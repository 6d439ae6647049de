"""Terminal output."""

from __future__ import annotations

from io import StringIO

import numpy as np
import torch
from rich.console import Console

from adapeft.parts.elements import Elements
from adapeft.parts.lora import Lora
from adapeft.subset.subset import Subset
from cluster.output.frontier import RunFrontier
from cluster.terminal.console import Terminal
from solver.frontier import Frontier


def test_values_stand_beside_each_other_behind_the_longest_name():
    output = StringIO()
    Terminal(Console(file=output, width=60)).pairs({"pearson_spearman": "0.1 → 0.8", "merge": ("adapeft", "  --out")})
    assert output.getvalue().splitlines() == [
        "pearson_spearman 0.1 → 0.8",
        "merge            adapeft",
        "                   --out",
    ]


def test_what_a_choice_left_of_its_budget_is_told():
    output = StringIO()
    chosen = Subset({"w": Elements((9,), torch.tensor([2, 5]))})
    Terminal(Console(file=output, width=200)).show_choice(chosen.described(value=0.5, bound=0.5, gap=0.0, unspent=1998))
    assert "unspent    1,998 parameters of the budget: more parameters would not lower the" in output.getvalue()
    output.truncate(0)
    Terminal(Console(file=output, width=200)).show_choice(chosen.described(value=0.5, bound=0.5, gap=0.0, unspent=0))
    assert "unspent" not in output.getvalue()
    Terminal(Console(file=output, width=200)).show_choice(chosen.described(value=0.5, bound=0.5, gap=0.0, num_drawn=7))
    assert "drawn      7 parameters of the budget: more choices would not lower the" in output.getvalue()


def test_a_draw_is_not_called_a_choice():
    drawn = Subset({"w": Lora((4, 6), 0, 1, 1.0)}).described(status="drawn", num_groups=210, num_chosen=91)
    output = StringIO()
    Terminal(Console(file=output, width=200)).show_choice(drawn)
    assert output.getvalue().split()[:2] == ["drawn", "as"]
    assert "not measured, drawn at random; 91 of 210 groups" in output.getvalue()
    Terminal(Console(file=output, width=200)).show_choice(drawn.described(reliability=0.03))
    assert "influence  not used, drawn at random" in output.getvalue()
    assert "verdict    a random draw was taken" in output.getvalue()


def test_a_sum_over_groups_is_not_called_a_prediction():
    chosen = Subset({"w": Elements((9,), torch.tensor([2, 5]))}).described(value=61.5, bound=61.5, gap=0.0, reach=0.1)
    shown = []
    for choice in (chosen, chosen.described(unspent=0), chosen.described(joint_value=0.9)):
        output = StringIO()
        Terminal(Console(file=output, width=200)).show_choice(choice)
        shown.append(output.getvalue())
    assert "61.5 summed over groups, bound 61.5" in shown[0]
    assert "61.5 predicted, bound 61.5" in shown[1], "single elements are counted together"
    assert "61.5 summed over groups, 0.9 in one step of all, bound 61.5" in shown[2]


def test_the_frontier_leaves_out_what_adds_next_to_nothing():
    budgets = np.array([1, 2, 5, 10, 20, 50, 100])
    values = np.array([0.2, 0.5, 0.5001, 0.9, 0.9, 0.9002, 0.9002])
    curve = Frontier(budgets, values, values, budgets, budgets)
    output = StringIO()
    Terminal(Console(file=output, width=100)).show_frontier(RunFrontier(curve, 1000, 50))
    lines = output.getvalue().splitlines()
    shown = [line.split()[1] for line in lines if line.strip() and line.split()[0].endswith("%")]
    assert shown == ["1", "2", "10", "50"]  # 50 is this run's
    assert any("this run" in line for line in lines)
