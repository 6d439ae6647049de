"""The data set of the demo: equal on all machines, with disjoint splits and without names that reveal the label."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from adapeft.config.load import load_config
from adapeft.errors import AdapeftError

DEMO = Path(__file__).parents[2] / "deploy" / "demo"


def _load_script():
    spec = importlib.util.spec_from_file_location("demo_docstrings", DEMO / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


corpus = _load_script()


def _package(folder: Path, *texts: str) -> Path:
    """Write a package with one function per text, two per file."""
    folder.mkdir(parents=True)
    for start in range(0, len(texts), 2):
        functions = [f"def f{i}():\n    {text!r}\n" for i, text in enumerate(texts[start : start + 2])]
        (folder / f"part{start}.py").write_text("\n".join(functions))
    return folder


def _sentences(thing: str) -> list[str]:
    verbs = ["Return", "Count", "Remove", "Draw", "Sort", "Rename", "Merge", "Split", "Compare", "Check"]
    return [f"{verb} the {thing} of a given object in place." for verb in verbs]


@pytest.fixture
def folders(tmp_path):
    shared = "Open the file and read the first line of it."
    return {
        "alpha": _package(tmp_path / "alpha", *_sentences("edges"), shared, shared.upper()),
        "beta": _package(tmp_path / "beta", *_sentences("columns"), shared),
    }


@pytest.mark.parametrize(
    ("docstring", "text"),
    [
        ("Draw all of the graph with NetworkX and numpy arrays.", "Draw all of the graph with X arrays."),
        ("A PyTorch module, see :class:`~torch.nn.Module`, for the loss.", "A X module, see X, for the loss."),
        ("Return the\n  value of `np.ndarray` as a list.", "Return the value of X as a list."),
        (
            "Make a copy of the DataFrame (see [`Trainer`]) in the memory.",
            "Make a copy of the X (see X) in the memory.",
        ),
        ("Turn a Python list (see the stdlib) into an array.", "Turn a X list (see the X) into an array."),
        ("Wait for the ray.get call to_be_done on the cluster.", "Wait for the X call X on the cluster."),
        ("Read [the manual](https://numpy.org) for all of it.", "Read the manual for all of it."),
        (
            "Sum of an array.\n\nAdds up all of the elements along an axis.",
            "Adds up all of the elements along an axis.",
        ),
    ],
)
def test_names_are_blanked(docstring, text):
    assert corpus.first_paragraph(docstring) == text


@pytest.mark.parametrize(
    "docstring",
    [
        "Too short.",
        ">>> import numpy as np\n>>> the sum of a list is a number in the end",
        "name (`str`, *optional*): the name of the model that is to be used",
        "- the first of a list\n- the second of a list",
        "Größe of the array that is to be read from the file",
        "Kernel launch heuristics register tiling fallback",
    ],
)
def test_what_is_not_prose_is_left_out(docstring):
    assert corpus.first_paragraph(docstring) is None


def test_one_example_for_look_alikes_and_none_for_shared_ones(folders):
    examples = corpus.collect(folders)
    assert Counter(example.label for example in examples) == {"alpha": 10, "beta": 10}
    assert not [example for example in examples if "first line" in example.text.lower()]


def test_per_package_limit(folders):
    assert Counter(example.label for example in corpus.collect(folders, per_package=4)) == {"alpha": 4, "beta": 4}


def test_tests_and_broken_files_are_left_out(tmp_path, folders):
    folder = folders["alpha"]
    before = corpus.collect({"alpha": folder})
    _package(folder / "tests", "Check that the tests of a package are not read.")
    (folder / "broken.py").write_text("def f(:")
    assert corpus.collect({"alpha": folder}) == before


def test_order_of_the_file_system_does_not_matter(folders, monkeypatch):
    before = corpus.collect(folders)
    walk = corpus.os.walk
    monkeypatch.setattr(
        corpus.os, "walk", lambda folder: ((root, dirs, files[::-1]) for root, dirs, files in list(walk(folder))[::-1])
    )
    assert corpus.collect(folders) == before


def test_the_standard_library_is_read_without_what_is_installed_in_it():
    folder = corpus.folder_of("python")
    parts = {path.relative_to(folder).parts[0] for path in corpus.sources(folder)}
    assert {"json", "email", "argparse.py"} <= parts
    assert not parts & {"site-packages", "dist-packages", "test", "idlelib"}


def test_missing_package():
    with pytest.raises(
        AdapeftError, match=r"package = no_such_package: is not installed. Run: pip install 'adapeft\[cluster,demo"
    ):
        corpus.folder_of("no_such_package")


def test_files_are_equal_whatever_the_hash_seed(tmp_path):
    """Run all steps of the script on the smallest packages twice, with different hash seeds of Python."""
    code = f"""
import runpy, sys
script = runpy.run_path({str(DEMO / "docstrings.py")!r})
examples = script["collect"]({{name: script["folder_of"](name) for name in ("networkx", "numpy")}}, per_package=40)
train, validation = script["split"](examples)
script["write"](script["Path"](sys.argv[1]) / "train.jsonl", train)
script["write"](script["Path"](sys.argv[1]) / "validation.jsonl", validation)
print(sorted({{"torch", "networkx", "numpy"}} & set(sys.modules)))
"""
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code, str(tmp_path / seed)]
        done = subprocess.run(
            command, env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(DEMO.parents[1])}, capture_output=True
        )
        assert done.stdout.decode().strip() == "[]", done.stderr.decode()
    files = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert files == ["train.jsonl", "validation.jsonl"]
    for name in files:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.slow
def test_the_whole_data_set(tmp_path):
    command = [sys.executable, DEMO / "docstrings.py", "--out", tmp_path]
    subprocess.run(command, env={"PYTHONPATH": str(DEMO.parents[1])}, check=True)
    rows = {name: _rows(tmp_path / f"{name}.jsonl") for name in ("train", "validation")}
    assert len(rows["train"]) > 3800
    assert len(rows["validation"]) > 600
    labels = Counter(row["label"] for row in rows["train"] + rows["validation"])
    assert set(labels) == set(corpus.PACKAGES)
    assert min(labels.values()) > 0.8 * max(labels.values())
    train, validation = ({corpus.likeness(row["text"]) for row in part} for part in rows.values())
    assert len(train) + len(validation) == len(rows["train"]) + len(rows["validation"])
    assert not train & validation
    words = {word for part in rows.values() for row in part for word in row["text"].lower().split()}
    assert not words & {*corpus.PACKAGES, "pytorch", "np", "pd", "nx", "stdlib"}


def _rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_split_shares():
    train, validation = corpus.split(corpus.Example(f"text {i}", "a") for i in range(2000))
    assert len(validation) / 2000 == pytest.approx(corpus.VALIDATION_SHARE, abs=0.03)
    assert not set(train) & set(validation)


def test_demo_config_needs_only_the_model():
    with pytest.raises(AdapeftError, match=r"has 1 problem:\n  model\.name: required"):
        load_config(DEMO / "demo.yaml")
    config = load_config(DEMO / "demo.yaml", ["model.name=/somewhere", "budget=1%"])
    assert config.select.exclude == ("*embeddings*",)
    assert config.train.learning_rate == 1.6e-2


@pytest.mark.skipif(importlib.util.find_spec(corpus.MODEL_PACKAGE) is None, reason="adapeft[demo] is not installed")
def test_model_folder_holds_a_model():
    assert (corpus.model_folder() / "config.json").is_file()
    assert (corpus.model_folder() / "model.safetensors").is_file()
