"""What every rank loads."""

import numpy as np
import torch

from adapeft.config_file import load_config
from cluster.inputs import load_inputs
from tests.cluster.checkpoints import write_bert, write_colours, write_config


def test_a_model_is_computed_in_the_precision_of_its_config(tmp_path):
    config = write_config(tmp_path / "run.yaml", write_bert(tmp_path / "base"), *write_colours(tmp_path))
    lowered = load_inputs(load_config(config, ["model.matmul_precision=medium"]))
    usual = load_inputs(load_config(config))
    try:
        lowered.model()
        assert torch.get_float32_matmul_precision() == "medium"
        usual.model()
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_training_batches_are_of_one_length_if_the_config_says_so(tmp_path):
    config = write_config(tmp_path / "run.yaml", write_bert(tmp_path / "base"), *write_colours(tmp_path))
    usual = load_inputs(load_config(config, ["train.batch_size=4"]))
    grouped = load_inputs(load_config(config, ["train.batch_size=4", "train.train_sampling_strategy=group_by_length"]))
    lengths = np.array(grouped.train.lengths)
    assert lengths.tolist() == [len(row["input_ids"]) for row in grouped.train.rows]
    assert len(set(lengths)) > 1

    def padding(batches: tuple[np.ndarray, ...]) -> int:
        assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
        return sum(lengths[batch].max() * len(batch) for batch in batches) - lengths.sum()

    assert padding(grouped.training_batches(1)) < padding(usual.training_batches(1)) / 2
