"""Tables of the memory that a run needs on its devices."""

from __future__ import annotations

from collections.abc import Mapping

from adapeft.memory.estimate import Load, Zero, memory, traffic
from cluster.terminal.console import Terminal, number_table
from cluster.units import size_of


def show_estimate(
    loads: Mapping[str, Load], zero: Zero, grid: Mapping[tuple[int, int], Mapping[str, int]], terminal: Terminal
) -> None:
    """Print bytes per device by part and stage of the run, and totals for every ZeRO stage and number of workers."""
    table = number_table(f"per device: workers {zero.workers}, ZeRO stage {zero.stage}", *loads)
    held = [memory(load, zero) for load in loads.values()]
    most = ["" if load.unknown is None else "≤ " for load in loads.values()]
    for part in held[0].parts:
        signs = most if part in ("activations", "allocator") else [""] * len(held)
        table.add_row(part, *(sign + size_of(each.parts[part]) for sign, each in zip(signs, held, strict=True)))
    table.add_row("total", *(sign + size_of(each.total) for sign, each in zip(most, held, strict=True)), style="bold")
    sent = [traffic(load, zero) for load in loads.values()]
    for kind in sent[0]:
        table.add_row(f"sent per step: {kind}", *(size_of(each[kind]) for each in sent))
    terminal.console.print(table)
    numbers = sorted({workers for _, workers in grid})
    table = number_table("largest stage, by workers", *map(str, numbers))
    for zero_stage in sorted({zero_stage for zero_stage, _ in grid}):
        held_by = [grid.get((zero_stage, workers)) for workers in numbers]
        cells = (max(most) + size_of(max(held.values())) if held else "refused" for held in held_by)
        table.add_row(f"ZeRO stage {zero_stage}", *cells)
    terminal.console.print(table)
