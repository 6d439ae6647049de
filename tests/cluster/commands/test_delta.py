"""``adapeft delta``: results can be merged and contain metadata, and invalid input gives an error."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from adapeft import Delta, conflict_of
from tests.adapeft.deltas.test_merge import CLASSIFIER, save
from tests.oracles.deltas import dense_of, drawn_delta
from tests.oracles.leaves import make_subset, weights
from tests.support.tiny import make_bert


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Return a base model, its deltas of rows, of elements and of both, and a delta of another base."""
    folder, model = tmp_path_factory.mktemp("deltas"), make_bert()
    found = {"base": save(make_bert(), folder / "base")}
    for seed, kind in enumerate(("row", "element", "mixed")):
        delta = drawn_delta(model, make_subset(model, kind).parts, seed, head=True, model=CLASSIFIER, method=kind)
        found[kind] = folder / f"{kind}.safetensors"
        delta.save(found[kind])
    replace(delta, fingerprint="f" * 64).save(folder / "foreign.safetensors")
    return {**found, "foreign": folder / "foreign.safetensors"}


def merged(command, files: dict[str, Path], delta: Path, out: Path) -> dict[str, torch.Tensor]:
    assert command("merge", delta, "--model", files["base"], "--out", out).returncode == 0
    return weights(AutoModelForSequenceClassification.from_pretrained(out))


def test_interpolate_then_merge(command, files, tmp_path):
    shares = {"row": 0.25, "element": 0.5, "mixed": 0.25}
    options = [option for share in shares.values() for option in ("--weights", share)]
    out = tmp_path / "mean.safetensors"
    status, output, errors = command(
        "delta", "interpolate", *(files[name] for name in shares), *options, "--out", out
    )  # fmt: skip
    assert status == 0, errors
    for pair in ("#1 and #2", "#1 and #3", "#2 and #3"):
        assert pair in output
    assert "adapeft delta diff" in output
    assert "interpolation" in output

    expected = {name: value.double() for name, value in weights(make_bert()).items()}
    deltas = {name: Delta.load(files[name]) for name in shares}
    heads = deltas["row"].new
    for name in heads:
        expected[name] = sum(share * deltas[key].new[name].double() for key, share in shares.items())
    for key, delta in deltas.items():
        for name, change in delta.changes.items():
            expected[name] += shares[key] * dense_of(change)
    for name, value in merged(command, files, out, tmp_path / "merged").items():
        torch.testing.assert_close(value, expected[name].float(), rtol=1e-6, atol=1e-6)

    sources = Delta.load(out).description["sources"]
    assert [source["weight"] for source in sources] == list(shares.values())
    for source, key in zip(sources, shares, strict=True):
        assert source["sha256"] == hashlib.sha256(files[key].read_bytes()).hexdigest()
        assert source["name"] == str(files[key])
    status, output, _ = command("show", out)
    assert f"0.5 · {files['element']}" in output.replace("\n" + " " * 11, " ")


def test_sum_and_scale(command, files, tmp_path):
    out, doubled = tmp_path / "sum.safetensors", tmp_path / "doubled.safetensors"
    added = ("delta", "sum", files["row"], files["mixed"], "--heads", files["mixed"])
    assert command(*added, "--out", out).returncode == 0
    assert command("delta", "scale", out, "--factor", "-2", "--out", doubled).returncode == 0
    deltas = [Delta.load(files[name]) for name in ("row", "mixed")]
    for path, factor in ((out, 1), (doubled, -2)):
        result = Delta.load(path)
        assert all(torch.equal(value, deltas[1].new[name]) for name, value in result.new.items())
        for name in {**deltas[0].changes, **deltas[1].changes}:
            expected = sum(factor * dense_of(delta.changes[name]) for delta in deltas if name in delta.changes)
            torch.testing.assert_close(dense_of(result.changes[name]), expected, rtol=1e-6, atol=1e-6)


def test_diff_says_where_two_conflict(command, files):
    status, output, errors = command("delta", "diff", files["row"], files["mixed"])
    assert status == 0, errors
    found = conflict_of(*(Delta.load(files[name]) for name in ("row", "mixed")))
    lines = [line.split() for line in output.splitlines()]
    both = next(line for line in lines if line[:3] == ["#1", "and", "#2"])
    assert both[3:] == [
        str(len(found.overlaps)),
        str(found.total.both),
        f"{found.total.opposite_share:.1%}",
        f"{round(found.total.cosine, 2) + 0.0:.2f}",
        f"{round(found.cosine, 2) + 0.0:.2f}",
    ]
    roles = [line for line in lines if line and line[0].startswith("bert.")]
    assert sum(int(line[1]) for line in roles) == found.total.both > 0
    lost = [float(line[4]) for line in roles]
    assert lost == sorted(lost, reverse=True)
    assert sum(lost) == pytest.approx(found.lost(found.total), abs=1e-3)
    assert "#1 and #2 both have classifier.weight, classifier.bias, which are new and not compared" in output


def test_a_difference_shows_the_conflict_it_adds_up(command, files, tmp_path):
    again = tmp_path / "again.safetensors"
    again.write_bytes(files["row"].read_bytes())
    weighed = ("--weights", "1", "--weights", "-1", "--out", tmp_path / "nothing.safetensors")
    status, output, errors = command("delta", "sum", files["row"], again, *weighed)
    assert status == 0, errors
    assert "100.0%" in output
    assert "-1.00" in output
    assert not Delta.load(tmp_path / "nothing.safetensors").changes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sum", "row", "mixed"], "new parameters and buffers are not differences to a base and cannot be added"),
        (["sum", "row", "foreign"], "only deltas of one base can be combined"),
        (["sum", "row", "row"], "given twice"),
        (["sum", "row", "mixed", "--weights", "1"], "give one for each of the 2 deltas"),
        (["sum", "row", "mixed", "--heads", "element"], "no delta of that name has new parameters"),
        (["interpolate", "row", "mixed", "--weights", "1", "--weights", "1"], "add up to 2"),
        (["scale", "row", "--factor", "inf"], "finite"),
        (["scale", "base", "--factor", "2"], "no such file; expected a delta"),
    ],
)
def test_bad_input(command, files, tmp_path, arguments, said):
    given = [files.get(argument, argument) for argument in arguments]
    status, _, errors = command("delta", *given, "--out", tmp_path / "out.safetensors")
    assert status == 2
    assert said in errors
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(command, files):
    before = files["mixed"].read_bytes()
    status, _, errors = command("delta", "scale", files["row"], "--factor", "2", "--out", files["mixed"])
    assert (status, files["mixed"].read_bytes()) == (2, before)
    assert "exists already" in errors
