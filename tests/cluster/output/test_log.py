"""Machine-readable logs: warnings and errors of a rank, and events of the driver."""

from __future__ import annotations

import json
import logging
import math
import warnings

import pytest
from transformers.utils import logging as transformers_logging

from cluster.output.log import EventLog, rank_log


def lines_of(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


@pytest.fixture(params=["closed", "propagating"])
def talkative(request):
    """Enable the warnings of transformers, which the command silences, as on a rank; it propagates them with CI=1."""
    verbosity = transformers_logging.get_verbosity()
    library = logging.getLogger("transformers")
    propagates = library.propagate
    transformers_logging.set_verbosity_warning()
    library.propagate = request.param == "propagating"
    yield
    library.propagate = propagates
    transformers_logging.set_verbosity(verbosity)


def test_a_rank_keeps_its_warnings_and_its_error(tmp_path, talkative):
    def work():
        logging.getLogger("some.library").info("of no interest")
        logging.getLogger("some.library").warning("it is %d too many", 3)
        transformers_logging.get_logger("transformers.models").warning("an odd checkpoint")
        warnings.warn("old", UserWarning, stacklevel=1)
        raise ZeroDivisionError("no value to divide by")

    path = tmp_path / "train-rank-1.jsonl"
    with pytest.raises(ZeroDivisionError), rank_log(path, "mine-1", "train", 1):
        work()
    logging.getLogger("some.library").warning("after the end")
    lines = lines_of(path)
    assert [line["level"] for line in lines] == ["WARNING"] * 3 + ["ERROR"]
    assert [line["message"] for line in lines[:2]] == ["it is 3 too many", "an odd checkpoint"]
    assert "UserWarning: old" in lines[2]["message"]
    assert lines[3]["message"] == "ZeroDivisionError: no value to divide by"
    assert "Traceback" in lines[3]["traceback"]
    assert all((line["run"], line["stage"], line["rank"]) == ("mine-1", "train", 1) for line in lines)


def test_a_rank_without_warnings_leaves_no_file(tmp_path):
    with rank_log(tmp_path / "quiet.jsonl", "mine-1", "train", 0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_of_counts_the_first_and_the_last_are_kept(tmp_path):
    log = EventLog(tmp_path / "logs" / "events.jsonl", "mine-1")
    assert list(tmp_path.iterdir()) == []
    for done in range(1, 4):
        log({"stage": "measure", "step": "slope", "done": done, "total": 3})
    for done in range(1, 3):
        log({"stage": "train", "step": "training", "done": done, "total": 9, "loss": 0.5})
    log({"stage": "train", "step": "evaluated", "at": 2, "metric": "loss", "loss": 0.5, "perplexity": math.inf})
    log.write("failed", logging.ERROR, cause="a disk is full")
    log.close()
    lines = lines_of(tmp_path / "logs" / "events.jsonl")
    assert [(line["message"], line.get("done")) for line in lines] == [
        *(("slope", 1), ("slope", 3)),
        *(("training", 1), ("training", 2)),
        *(("evaluated", None), ("failed", None)),
    ]
    assert lines[4]["perplexity"] == "inf"
    assert (lines[5]["level"], lines[5]["cause"]) == ("ERROR", "a disk is full")
