"""What every rank loads."""

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
