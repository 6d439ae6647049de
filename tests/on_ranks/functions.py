"""Rank functions for the tests of the launchers."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import time

import torch

from adapeft.errors import AdapeftError
from cluster.ranks.peak import peak_memory


def count_to_three(config, report, start):
    print("printed on a rank")
    for done in range(1, 4):
        report({"step": "counting", "done": done, "total": 3})
    priority = os.getpriority(os.PRIO_PROCESS, 0)
    return {"sum": start + 3, "output": config.output, "priority": priority, "process": os.getpid()}


def hold(config, report, mebibytes):
    torch.ones(mebibytes * 2**20, dtype=torch.uint8)
    return {"peak": peak_memory(torch.device("cpu"))}


def map_again(config, report, mebibytes):
    """Return how many bytes glibc maps for a block after it has freed one of the same size."""
    torch.empty(mebibytes * 2**20, dtype=torch.uint8)
    before = _Mallinfo.now().hblkhd
    block = torch.empty(mebibytes * 2**20, dtype=torch.uint8)
    return {"mapped": _Mallinfo.now().hblkhd - before, "held": len(block)}


class _Mallinfo(ctypes.Structure):
    """See mallinfo2(3)."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks")),
        *((name, ctypes.c_size_t) for name in ("fsmblks", "uordblks", "fordblks", "keepcost")),
    ]

    @staticmethod
    def now():
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _Mallinfo
        return library.mallinfo2()


def multiply_shapes():
    """Return how many more bytes are in use after 300 shapes of bfloat16 matrices than after the first 300."""
    in_use = []
    for length in range(1, 601):
        torch.ones(64, length, dtype=torch.bfloat16) @ torch.ones(length, 64, dtype=torch.bfloat16)
        if length % 300 == 0:
            now = _Mallinfo.now()
            in_use.append(now.uordblks + now.hblkhd)
    return in_use[1] - in_use[0]


def count_weights(config, report):
    """Return the number of elements of the parameters that exist in this process."""
    gc.collect()
    found = [value for value in gc.get_objects() if isinstance(value, torch.nn.Parameter)]
    return {"elements": sum(p.numel() + p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in found)}


def refuse(config, report):
    raise AdapeftError("data.text = 'x': found only by a rank. Correct it.")


class OneRankError(AdapeftError):
    """An error that pickle cannot recreate, because its message alone does not suffice."""

    def __init__(self, field, value):
        super().__init__(f"{field} = {value}: found only by rank 1. Correct it.")


def refuse_on_one(config, report):
    """Rank 1 raises an input error while rank 0 waits for it."""
    if torch.distributed.get_rank() == 1:
        raise OneRankError("data.text", "x")
    torch.distributed.all_reduce(torch.ones(1))
    return {}


def break_down(config, report):
    raise ZeroDivisionError("no value to divide by\nand a second line")


def die(config, report):
    """Rank 1 is killed while rank 0 waits for it."""
    if torch.distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.all_reduce(torch.ones(1))
    return {}


def hang(config, report):
    """Rank 1 never joins the collective of the others."""
    if torch.distributed.get_rank() == 1:
        time.sleep(300)
    torch.distributed.all_reduce(torch.ones(1))
    return {}


def go_on(config, report):
    """Report one step, then sleep for a long time."""
    report({"step": "one", "done": 1, "total": 2})
    time.sleep(300)
    return {}
