"""Run under torchrun: measures, trains, applies and evaluates on a quantized base at every ZeRO stage.

``torchrun --nproc-per-node 2 -m tests.on_ranks.quantized CONFIG OUT`` writes a run folder per case and stage, with the
losses of the best step and of the applied delta.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

from adapeft.config.load import load_config
from cluster.output.folder import RunFolder
from tests.support.ranks import leave

CASES = {
    "row": ["groups=row", "select.rank=4", "budget=10%"],
    # 10% would take all elements of positive influence (7%), among them key biases, whose sign is rounding alone.
    "element": ["groups=element", "select.rank=4", "budget=1%"],
    "lora": ["method=lora", "budget=10%"],
}
# 8-bit weights are not divided at stage 3.
RUNS = [("nf4", case, stage) for case in CASES for stage in (0, 1, 2, 3)]
RUNS += [("int8", "row", stage) for stage in (0, 1, 2)]
OVERRIDES = ["calibration=32", "select.batch_size=16", "epochs=1", "learning_rate=1e-3"]


def overrides_of(quantization: str, case: str, stage: int, out: Path) -> list[str]:
    output = f"output={out / f'{quantization}-{case}-{stage}'}"
    return [*OVERRIDES, *CASES[case], f"quantization={quantization}", f"zero_stage={stage}", output]


def main(path: str, out: Path) -> None:
    from cluster.ranks import finetune, measure
    from cluster.ranks.evaluate import evaluate
    from cluster.zero.engine import join

    join()
    for run in RUNS:
        config = load_config(path, [*overrides_of(*run, out), f"workers={dist.get_world_size()}"])
        # At the usual threshold stage 3 would keep a tiny model whole on every rank.
        with (
            patch.object(measure, "inference_engine", partial(measure.inference_engine, persistence_threshold=0)),
            patch.object(finetune, "training_engine", partial(finetune.training_engine, persistence_threshold=0)),
        ):
            measure.measure_and_choose(config, lambda event: None)
            trained = finetune.finetune(config, lambda event: None)
        scores = evaluate(config, lambda event: None, delta=None, base=False)["scores"]
        if dist.get_rank() == 0:
            losses = [trained["after"]["loss"], scores["loss"]]
            (RunFolder.of(config).path / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    leave()
