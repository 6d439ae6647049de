"""Data: sources, checks of their columns, and batches against the tokenizer's output for single texts."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from adapeft.data.description import DataDescription
from adapeft.data.labels import Head
from adapeft.data.padding import with_padding
from adapeft.data.sources import load_rows
from adapeft.errors import AdapeftError
from adapeft.tasks.causal_lm import CausalLMData
from adapeft.tasks.describe import describe
from adapeft.tasks.registry import TASKS
from adapeft.tasks.sequence_classification import ClassificationData
from tests.support.processes import FORKS

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason=f"the benchmark data is not at {SHARED}")

WORDS = ["a", "b", "c", "d", "e"]
ROWS = [{"text": "a b", "label": 0}, {"text": "c", "label": 1}, {"text": "d e a", "label": 0}]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes rows to a file in ``tmp_path``, by its suffix, and returns the path."""

    def write(name: str, rows: list[dict] | str) -> str:
        path = tmp_path / name
        if isinstance(rows, str):
            path.write_text(rows)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows))
        elif path.suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        else:
            datasets.Dataset.from_list(rows).to_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
        return str(path)

    return write


def config(train: str = "none.jsonl", evaluation: str = "", **changes) -> ClassificationData:
    return ClassificationData(train=str(train), evaluation=str(evaluation or train), **{"max_length": 8, **changes})


def tokenizer(is_bert: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words: with [CLS], [SEP] and [PAD] like BERT, or only an end-of-text token like GPT-2."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if is_bert else ["[UNK]", "<eos>"]
    model = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(special + WORDS)}, unk_token="[UNK]")
    )
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if not is_bert:
        return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", eos_token="<eos>")
    model.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    named = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=model, model_input_names=inputs, **named)


def words(batch_ids: torch.Tensor, of: PreTrainedTokenizerFast) -> list[str]:
    return [" ".join(of.convert_ids_to_tokens(row)) for row in batch_ids.tolist()]


def problem(is_regression: bool) -> str:
    return "regression" if is_regression else "single_label_classification"


CLASSES = DataDescription(
    num_train=3, num_evaluation=3, label_names=None, problem_type="single_label_classification", num_labels=2
)


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(folder, suffix):
    assert load_rows(folder(f"rows.{suffix}", ROWS), "data.train").to_list() == ROWS


def test_lines_of_a_text_keep_their_breaks(folder):
    assert load_rows(folder("a.txt", " a b \n\nc"), "data.train")["text"][:] == [" a b \n", "\n", "c"]


def test_words_of_a_csv_that_mean_nothing_elsewhere_stay_words(folder):
    rows = load_rows(folder("a.csv", "text,label\nNA,0\nnull,1\nNone,0\n,1\n"), "data.train")
    assert rows["text"][:] == ["NA", "null", "None", None]


def test_a_changed_file_is_read_anew(folder):
    load_rows(folder("a.jsonl", ROWS), "data.train")
    assert len(load_rows(folder("a.jsonl", ROWS[:2]), "data.train")) == 2


def test_brackets_in_a_path_are_no_pattern(tmp_path):
    (tmp_path / "run[1]*").mkdir()
    (tmp_path / "run[1]*" / "a.txt").write_text("a\n")
    assert len(load_rows(str(tmp_path / "run[1]*" / "a.txt"), "data.train")) == 1


@pytest.mark.parametrize(
    ("source", "field", "expected"),
    [
        ("imdb", "data.train", ("imdb", None, "train")),
        ("imdb", "data.evaluation", ("imdb", None, "validation")),
        ("nyu-mll/glue:cola", "data.evaluation", ("nyu-mll/glue", "cola", "validation")),
        ("imdb@test", "data.train", ("imdb", None, "test")),
        ("glue:cola@train", "data.evaluation", ("glue", "cola", "train")),
        ("nyu-mll/glue:cola@train[:10%]", "data.train", ("nyu-mll/glue", "cola", "train[:10%]")),
        ("imdb@test[:10%]", "data.evaluation", ("imdb", None, "test[:10%]")),
        ("wikimedia/wikipedia:20231101.en@train", "data.train", ("wikimedia/wikipedia", "20231101.en", "train")),
        ("mlfoundations/dclm-baseline-1.0", "data.train", ("mlfoundations/dclm-baseline-1.0", None, "train")),
    ],
)
def test_hub_sources(monkeypatch, source, field, expected):
    def load_dataset(path, name, split):
        assert (path, name, split) == expected
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows(source, field).to_list() == ROWS


def test_no_network(monkeypatch):
    with pytest.raises(AdapeftError, match=r"data.train = glue:cola: cannot be read.*hub data set, split 'train'"):
        load_rows("glue:cola", "data.train")


@pytest.mark.parametrize("source", ["train.jsonl", "./train", "folder/train.jsn", "/nowhere/train.csv"])
def test_missing_files(source):
    with pytest.raises(AdapeftError, match=f"data.train = {source}: no such file.*Relative paths start at"):
        load_rows(source, "data.train")


def test_missing_file_beside_a_similar_one(folder):
    path = folder("train.jsonl", ROWS)
    with pytest.raises(AdapeftError, match=r"Did you mean '.*train.jsonl'"):
        load_rows(path.replace("train.jsonl", "trian.jsonl"), "data.train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xml", "<a/>", "cannot read '.xml' files. Convert it to one of .jsonl"),
        ("a.jsonl", "no json\n{", "cannot be read: JSON parse error.*well-formed jsonl"),
        ("a.parquet", "no parquet", "cannot be read: Parquet magic.*well-formed parquet"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "\n", "holds no rows"),
        ("a.csv", "text,label\n", "holds no rows"),
        ("a.txt", "", "is empty"),
    ],
)
def test_unreadable_and_empty_files(folder, name, content, message):
    with pytest.raises(AdapeftError, match=f"data.evaluation = .*{name}: .*{message}"):
        load_rows(folder(name, content), "data.evaluation")


def test_folders_are_refused(tmp_path):
    with pytest.raises(AdapeftError, match=r"is a folder. Name one file in it"):
        load_rows(str(tmp_path), "data.train")


# --- description -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names", "is_regression", "num_labels"),
    [
        ([0, 1, 0], None, False, 2),
        ([1, 3, 1], ("1", "3"), False, 2),
        ([True, False, True], ("False", "True"), False, 2),
        (["yes", "no", "maybe"], ("maybe", "no", "yes"), False, 3),
        ([0.5, -1.0, 2], None, True, 1),
        ([1.0, 2.0, 3.0], None, True, 1),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_kinds_of_labels(folder, suffix, labels, names, is_regression, num_labels):
    labels = [float(label) for label in labels] if is_regression else labels
    path = folder(f"a.{suffix}", [{"text": "a", "label": label} for label in labels])
    assert describe(TASKS["sequence-classification"], config(path)) == DataDescription(
        3, 3, names, problem(is_regression), num_labels
    )


def test_named_classes_keep_their_order(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(ROWS, features=features).to_parquet(path)
    assert describe(TASKS["sequence-classification"], config(str(path))).label_names == ("no", "yes")


def test_whole_targets_in_evaluation(folder):
    train = folder("train.csv", "text,label\na,0.5\nb,1\n")
    evaluation = folder("evaluation.csv", "text,label\na,3\nb,-2\n")
    assert describe(TASKS["sequence-classification"], config(train, evaluation)).problem_type == "regression"


def test_classes_written_as_floats_are_announced(folder, recwarn):
    describe(TASKS["sequence-classification"], config(folder("targets.csv", "text,label\na,0.5\nb,1.0\n")))
    assert not recwarn
    path = folder("classes.csv", "text,label\na,1.0\nb,0.0\nc,1.0\n")
    with pytest.warns(UserWarning, match=r"targets of a regression, though all .* whole numbers \(0\.0, 1\.0\)"):
        assert describe(TASKS["sequence-classification"], config(path)).problem_type == "regression"


def test_a_language_model_needs_no_labels(folder):
    path = folder("a.txt", "a b\nc\n")
    data = CausalLMData(train=path, evaluation=path)
    assert describe(TASKS["causal-lm"], data) == DataDescription(2, 2, None, problem_type=None, num_labels=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "lable"}, "data.label = 'lable': data.train has no such column. Did you mean 'label'"),
        ({"text": "sentence"}, "data.text = 'sentence': data.train has no such column.* It has 'text', 'label'"),
        ({"text_pair": "text_2"}, "data.text_pair = 'text_2': data.train has no such column. Did you mean 'text'"),
    ],
)
def test_missing_columns(folder, changes, message):
    with pytest.raises(AdapeftError, match=message):
        describe(TASKS["sequence-classification"], config(folder("a.jsonl", ROWS), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": "text"}, "data.label = 'text': is also data.text. Name another column"),
        ({"text_pair": "text"}, "data.text_pair = 'text': is also data.text"),
        ({"text": "label", "text_pair": "text"}, "data.label = 'label': is also data.text"),
    ],
)
def test_a_column_is_named_once(folder, changes, message):
    with pytest.raises(AdapeftError, match=message):
        describe(TASKS["sequence-classification"], config(folder("a.jsonl", ROWS), **changes))
    path = folder("a.txt", "a\n")
    text = CausalLMData(train=path, evaluation=path)
    assert describe(TASKS["causal-lm"], text).num_train == 1, "no label is read"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"text": "a", "label": 1}\n{"text": "b"}', r"data.label = 'label': row 1 of data.train .* None.*\(1 of 2\)"),
        ('{"text": "a", "label": 1.5}\n{"text": "b", "label": NaN}', "row 1 of data.train .* nan, not a label"),
        ('{"text": "a", "label": -1}\n{"text": "b", "label": -1}', r"row 0 of data.train .* -1, .*\(2 of 2\)"),
        (
            '{"text": "a", "label": 1}\n{"text": "b", "label": "x"}',
            "data.train holds Json.* in this column. Labels have to be all integers",
        ),
        ('{"text": "a", "label": [1]}\n{"text": "b", "label": [0]}', "data.train holds List.* in this column"),
        ('{"text": "a", "label": 1}\n{"text": "b", "label": 1}', "every row of data.train has the label 1. Give at"),
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": " "}', r"row 1 of .* ' ', not a label.*1 of 2"),
        ('{"text": "a", "label": 0.5}\n{"text": "b", "label": -1e39}', r"row 1 of .* -1e\+39, not a label.* float32"),
        ('{"text": "a", "label": 1}\n{"text": null, "label": 0}', "data.text = 'text': row 1 of .* None, not a text"),
        ('{"text": 4, "label": 1}\n{"text": 5, "label": 0}', r"row 0 of data.train .* has 4, not a text.*\(2 of 2\)"),
    ],
)
def test_bad_values(folder, lines, message):
    with pytest.raises(AdapeftError, match=message):
        describe(TASKS["sequence-classification"], config(folder("a.jsonl", lines)))


def test_a_hole_in_the_labels_of_a_csv(folder):
    with pytest.raises(AdapeftError, match=r"row 2 of data.train .* None, not a label"):
        describe(TASKS["sequence-classification"], config(folder("a.csv", "text,label\na,0\nb,1\nc,\n")))


@pytest.mark.parametrize(
    ("train", "evaluation", "message"),
    [
        (["x", "y"], ["x", "z"], r"data.evaluation has labels that data.train does not: 'z' \(1 of 2 rows\)"),
        ([0, 2], [1, 3], r"labels that data.train does not: 1, 3 \(2 of 2 rows\)"),
        ([0, 1], ["0", "1"], "its type is integer in data.train and string in data.evaluation"),
        ([0, 1], [0.5, 1.5], "its type is integer in data.train and float in data.evaluation"),
    ],
)
def test_evaluation_that_does_not_fit(folder, train, evaluation, message):
    paths = [
        folder(f"{name}.jsonl", [{"text": "a", "label": label} for label in labels])
        for name, labels in (("train", train), ("evaluation", evaluation))
    ]
    with pytest.raises(AdapeftError, match=message):
        describe(TASKS["sequence-classification"], config(*paths))


def test_targets_and_the_head_of_the_model(folder):
    path = folder("a.jsonl", [{"text": "a", "label": label} for label in (0.5, 1.5)])
    assert describe(TASKS["sequence-classification"], config(path), Head(1, None)).problem_type == "regression"
    with pytest.raises(AdapeftError, match=r"targets .* need a head of 1 output, but model.name has one of 2"):
        describe(TASKS["sequence-classification"], config(path), Head(2, None))


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_a_batch_of_single_texts(folder):
    data, bert = config(), tokenizer()
    tokenized = TASKS["sequence-classification"].tokenize(datasets.Dataset.from_list(ROWS), data, bert, CLASSES)
    batch = tokenized.collate([2, 1])
    assert len(tokenized) == 3
    assert words(batch.inputs["input_ids"], bert) == ["[CLS] d e a [SEP]", "[CLS] c [SEP] [PAD] [PAD]"]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert torch.equal(batch.labels, torch.tensor([0, 1]))
    assert torch.equal(batch.ids, torch.tensor([2, 1]))
    moved = batch.to("meta")
    assert {moved.labels.device.type, moved.ids.device.type, moved.inputs["input_ids"].device.type} == {"meta"}


@pytest.mark.parametrize(("columns", "shortest"), [({}, 3), ({"text_pair": "other"}, 5)])
def test_an_example_without_room_for_its_text(columns, shortest):
    rows = datasets.Dataset.from_list([{"text": "a b c", "other": "d e", "label": 0}])
    for length in range(1, shortest):
        with pytest.raises(AdapeftError, match=rf"data.max_length = {length}: .* Raise it to at least {shortest}"):
            TASKS["sequence-classification"].tokenize(rows, config(max_length=length, **columns), tokenizer(), CLASSES)
    shortest_batch = (
        TASKS["sequence-classification"]
        .tokenize(rows, config(max_length=shortest, **columns), tokenizer(), CLASSES)
        .collate([0])
    )
    assert shortest_batch.inputs["input_ids"].shape == (1, shortest)
    without = tokenizer(is_bert=False)
    one = TASKS["sequence-classification"].tokenize(rows, config(max_length=1), without, CLASSES)
    assert words(one.collate([0]).inputs["input_ids"], without) == ["a"]


def test_a_batch_of_pairs():
    rows = datasets.Dataset.from_list(
        [{"text": "a b", "other": "c", "label": 0}, {"text": "d", "other": "e", "label": 1}]
    )
    batch = (
        TASKS["sequence-classification"].tokenize(rows, config(text_pair="other"), tokenizer(), CLASSES).collate([0, 1])
    )
    assert words(batch.inputs["input_ids"], tokenizer()) == ["[CLS] a b [SEP] c [SEP]", "[CLS] d [SEP] e [SEP] [PAD]"]
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]


def test_long_texts_are_cut():
    rows = datasets.Dataset.from_list([{"text": "a b c d e", "label": 0}])
    batch = TASKS["sequence-classification"].tokenize(rows, config(max_length=4), tokenizer(), CLASSES).collate([0])
    assert words(batch.inputs["input_ids"], tokenizer()) == ["[CLS] a b [SEP]"]


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["no", "yes"], ("maybe", "no", "yes"), torch.tensor([1, 2])),
        ([True, False], ("False", "True"), torch.tensor([1, 0])),
        ([3, 0], None, torch.tensor([3, 0])),
        ([0.5, 2.0], None, torch.tensor([0.5, 2.0])),
        ([3, 4], None, torch.tensor([3.0, 4.0])),
    ],
)
def test_labels_become_numbers(labels, names, expected):
    rows = datasets.Dataset.from_list([{"text": "a", "label": label} for label in labels])
    description = DataDescription(2, 2, names, problem(expected.is_floating_point()), 4)
    batch = TASKS["sequence-classification"].tokenize(rows, config(), tokenizer(), description).collate([0, 1])
    assert batch.labels.dtype == expected.dtype
    assert torch.equal(batch.labels, expected)


def test_a_tokenizer_without_padding_stays_as_it_is():
    gpt = tokenizer(is_bert=False)
    rows = datasets.Dataset.from_list(ROWS)
    batch = TASKS["sequence-classification"].tokenize(rows, config(), gpt, CLASSES).collate([0, 1])
    assert words(batch.inputs["input_ids"], gpt) == ["a b", "c <eos>"]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert gpt.pad_token is None


def test_padding_without_any_special_token():
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    assert with_padding(plain).pad_token_id == 0


def test_a_text_without_tokens():
    rows = datasets.Dataset.from_list([{"text": "a", "label": 0}, {"text": "", "label": 1}])
    with pytest.raises(AdapeftError, match=r"data.text = 'text': row 1 .* no tokens \(1 of 2 rows have none\). Drop"):
        TASKS["sequence-classification"].tokenize(rows, config(), tokenizer(is_bert=False), CLASSES)


def test_no_batching_changes_an_example():
    tokenized = TASKS["sequence-classification"].tokenize(
        datasets.Dataset.from_list(ROWS), config(), tokenizer(), CLASSES
    )
    together = tokenized.collate([0, 1, 2])
    for row in range(3):
        alone = tokenized.collate([row])
        length = alone.inputs["input_ids"].shape[1]
        assert torch.equal(together.inputs["input_ids"][row, :length], alone.inputs["input_ids"][0])
        assert not together.inputs["attention_mask"][row, length:].any()


def test_tokenized_data_travels_between_processes():
    tokenized = TASKS["sequence-classification"].tokenize(
        datasets.Dataset.from_list(ROWS), config(), tokenizer(), CLASSES
    )
    again = pickle.loads(pickle.dumps(tokenized))
    assert torch.equal(again.collate([0, 1]).inputs["input_ids"], tokenized.collate([0, 1]).inputs["input_ids"])


def test_blocks_of_a_language_model():
    gpt = tokenizer(is_bert=False)
    rows = datasets.Dataset.from_list([{"text": text} for text in ("a b", "", "c", "d e a b")])
    tokenized = TASKS["causal-lm"].tokenize(rows, config(max_length=4), gpt)
    batch = tokenized.collate([0, 1])
    # Ten tokens: the last two do not fill a block. The empty text adds no token.
    assert words(batch.inputs["input_ids"], gpt) == ["a b <eos> c", "<eos> d e a"]
    assert len(tokenized) == 2
    assert batch.inputs["attention_mask"].all()
    assert torch.equal(batch.labels, batch.inputs["input_ids"])
    assert batch.labels.dtype == torch.int64


def test_lines_of_a_file_are_one_text(folder):
    gpt = tokenizer(is_bert=False)
    rows = load_rows(folder("a.txt", "a b\n\nc d\n"), "data.train")
    batch = TASKS["causal-lm"].tokenize(rows, config(max_length=4), gpt).collate([0])
    assert words(batch.inputs["input_ids"], gpt) == ["a b c d"]


def test_language_model_blocks_have_no_special_tokens():
    bert = tokenizer()
    batch = TASKS["causal-lm"].tokenize(datasets.Dataset.from_list(ROWS), config(max_length=3), bert).collate([0, 1])
    assert words(batch.inputs["input_ids"], bert) == ["a b c", "d e a"]


def test_too_little_text_for_a_block():
    with pytest.raises(AdapeftError, match=r"data.max_length = 100: the texts have only 9 tokens, less than one block"):
        TASKS["causal-lm"].tokenize(datasets.Dataset.from_list(ROWS), config(max_length=100), tokenizer(is_bert=False))
    with pytest.raises(AdapeftError, match=r"data.max_length = 1: the first token of a block is not predicted"):
        TASKS["causal-lm"].tokenize(datasets.Dataset.from_list(ROWS), config(max_length=1), tokenizer(is_bert=False))


def read_and_tokenize(path: str, cache: Path, answers) -> None:
    datasets.config.HF_DATASETS_CACHE = cache
    rows = load_rows(path, "data.train")
    data = TASKS["sequence-classification"].tokenize(rows, config(), tokenizer(), CLASSES)
    answers.put((int(data.collate(range(len(data))).inputs["input_ids"].sum()), len(data)))


def test_processes_at_once(folder, tmp_path):
    """Two processes that share a cache, as the ranks of a machine do, read and tokenize the same file."""
    path, answers = folder("a.jsonl", ROWS * 500), FORKS.Queue()
    ranks = [FORKS.Process(target=read_and_tokenize, args=(path, tmp_path / "cache", answers)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    found = [answers.get(timeout=900) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert found[0][1] == 1500
    assert found[0] == found[1]


# --- the benchmarks' own files ---------------------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize(
    ("name", "text_pair", "sizes", "is_regression"),
    [
        ("cola", None, (8551, 1043), False),
        ("rte", "text_pair", (2490, 277), False),
        ("mrpc", "text_pair", (3668, 408), False),
        ("stsb", "text_pair", (5749, 1500), True),
    ],
)
def test_glue(name, text_pair, sizes, is_regression):
    paths = [str(SHARED / "glue" / name / f"{split}.jsonl") for split in ("train", "validation")]
    data = config(*paths, text_pair=text_pair, max_length=64)
    description = describe(TASKS["sequence-classification"], data)
    assert description == DataDescription(*sizes, None, problem(is_regression), 1 if is_regression else 2)
    rows = load_rows(data.evaluation, "data.evaluation")
    tokenized = TASKS["sequence-classification"].tokenize(rows, data, tokenizer(), description)
    assert len(tokenized) == sizes[1]
    assert tokenized.collate(range(32)).labels.tolist() == pytest.approx(rows["label"][:32])


@needs_shared
def test_wikitext():
    gpt = tokenizer(is_bert=False)
    data = config(str(SHARED / "wikitext2" / "validation.txt"), max_length=128)
    num_words = len(Path(data.train).read_text().split())
    assert len(TASKS["causal-lm"].tokenize(load_rows(data.train, "data.train"), data, gpt)) == num_words // 128
