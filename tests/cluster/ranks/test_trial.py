"""What a trial of a learning rate trains on and is evaluated on."""

from dataclasses import replace

import numpy as np
import pytest

from adapeft.config.load import load_config
from cluster.ranks.inputs import Inputs, load_inputs
from cluster.ranks.trial import _held_out
from tests.support.checkpoints import write_bert, write_colours, write_config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    folder = tmp_path_factory.mktemp("trial")
    data = write_colours(folder, num_train=3000)
    return load_inputs(load_config(write_config(folder / "run.yaml", write_bert(folder / "base"), *data)))


@pytest.mark.parametrize(("num_trained", "expected"), [(4, 32), (64, 64), (264, 256)])
def test_a_trial_is_evaluated_on_as_many_examples_as_it_trains_on(inputs, num_trained, expected):
    train = replace(inputs.train, rows=inputs.train.rows.add_column("place", np.arange(3000)))
    found = _held_out(replace(inputs, train=train), num_trained)
    assert len(found.evaluation) == expected
    assert sorted([*found.evaluation.rows["place"], *found.train.rows["place"]]) == list(range(3000))


def test_a_small_data_set_keeps_nine_tenths_to_train_on(inputs):
    small = replace(inputs, train=inputs.train.select(np.arange(95)))
    found = _held_out(small, 264)
    assert (len(found.evaluation), len(found.train)) == (9, 86)
