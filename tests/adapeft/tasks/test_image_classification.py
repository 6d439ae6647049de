"""Tests of image classification: files and bytes, what is no image, the pixels, and a model's trial."""

from __future__ import annotations

import datasets
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

import adapeft
from adapeft.data.description import Batch
from adapeft.data.sources import rows_of
from adapeft.errors import AdapeftError
from adapeft.memory.activations import repeated_token
from adapeft.model.load import build_structure, load_tokenizer, task_of
from adapeft.model.section import Model
from adapeft.model.trial import check_images
from adapeft.model.unloaded.weightless import Weightless
from adapeft.tasks.describe import describe
from adapeft.tasks.losses.cross_entropy import ImageClasses
from adapeft.tasks.losses.own_loss import check_own_loss
from adapeft.tasks.registry import TASKS
from tests.oracles.measuring import check_curvature_of_classes, in_double
from tests.support.checkpoints import write_lines
from tests.support.pictures import COLOURS, picture, write_pictures, write_vit

TASK = TASKS["image-classification"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_vit(folder / "vit")
    write_lines(folder / "rows.jsonl", write_pictures(folder / "all", 9, seed=1))
    return folder


def data_of(path, **options):
    return TASK.data(train=str(path), evaluation=str(path), **{"label": "labels", **options})


def tokenized(folder, data):
    rows = rows_of(data, "data.train")
    return TASK.tokenize(
        rows, data, load_tokenizer(Model(name=str(folder / "vit"), task=TASK.name)), describe(TASK, data)
    )


def make_model(folder, **options):
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_pretrained(folder / "vit", num_labels=3, **options).eval()


def test_pixels_are_those_of_the_models_own_processor(folder):
    found = tokenized(folder, data_of(folder / "rows.jsonl"))
    batch = found.collate([2, 0])
    processor = AutoImageProcessor.from_pretrained(folder / "vit")
    opened = [datasets.Image().decode_example({"path": str(folder / f"all/{n}.png"), "bytes": None}) for n in (2, 0)]
    expected = processor(images=opened, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch.inputs["pixel_values"], expected)
    assert batch.inputs.keys() == {"pixel_values"}
    rows = rows_of(data_of(folder / "rows.jsonl"), "data.train")
    assert [COLOURS[label] for label in batch.labels] == [rows["labels"][2], rows["labels"][0]]
    assert batch.ids.tolist() == [2, 0]


def test_files_and_bytes_are_the_same_examples(folder, tmp_path):
    data = data_of(folder / "rows.jsonl")
    names = [f"all/{number}.png" for number in range(9)]
    labels = rows_of(data, "data.train")["labels"][:]
    contents = [(folder / name).read_bytes() for name in names]
    forms = {
        "bytes": datasets.Dataset.from_dict({"image": contents, "labels": labels}),
        "images": datasets.Dataset.from_dict({"image": [str(folder / name) for name in names], "labels": labels}),
    }
    forms["images"] = forms["images"].cast_column("image", datasets.Image())
    expected = tokenized(folder, data).collate(range(9))
    content = describe(TASK, data).content
    for name, rows in forms.items():
        rows.to_parquet(tmp_path / f"{name}.parquet")
        again = data_of(tmp_path / f"{name}.parquet")
        batch = tokenized(folder, again).collate(range(9))
        assert torch.equal(batch.inputs["pixel_values"], expected.inputs["pixel_values"])
        assert torch.equal(batch.labels, expected.labels)
        assert describe(TASK, again).content == content


def test_another_file_of_the_same_name_is_other_data(tmp_path):
    data = data_of(write_lines(tmp_path / "rows.jsonl", write_pictures(tmp_path / "all", 9, seed=1)))
    before = describe(TASK, data).content
    (tmp_path / "all" / "3.png").write_bytes(picture("red", 77))
    assert describe(TASK, data).content != before


def test_pictures_of_other_modes_are_converted(folder, tmp_path):
    rows = datasets.Dataset.from_dict(
        {"image": [picture("red", 1, mode) for mode in ("RGB", "L", "RGBA", "P")], "labels": ["a", "b", "a", "b"]}
    )
    rows.to_parquet(tmp_path / "rows.parquet")
    batch = tokenized(folder, data_of(tmp_path / "rows.parquet")).collate(range(4))
    assert batch.inputs["pixel_values"].shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no image", "cannot identify image file"), (b"", "cannot identify"), (None, "No such file")],
)
def test_what_is_no_image_is_refused_or_dropped(folder, tmp_path, content, message):
    rows = write_pictures(tmp_path / "all", 6, seed=1)
    path = write_lines(tmp_path / "rows.jsonl", rows)
    place = tmp_path / "all" / "4.png"
    place.unlink() if content is None else place.write_bytes(content)
    with pytest.raises(
        AdapeftError, match=rf"row 4 \(counted from 0\): data\.image = 'image' is not an image: .*{message}"
    ):
        tokenized(folder, data_of(path))
    kept = tokenized(folder, data_of(path, invalid="drop"))
    assert len(kept) == 5
    assert [COLOURS[label] for label in kept.collate(range(5)).labels] == [rows[n]["labels"] for n in (0, 1, 2, 3, 5)]


def test_a_truncated_or_missing_image_is_refused(folder, tmp_path):
    whole = picture("red", 5)
    for content, message in ((whole[: len(whole) // 2], "truncated|broken|unrecognized"), (None, "it is missing")):
        rows = datasets.Dataset.from_dict({"image": [whole, content], "labels": ["a", "b"]})
        rows.to_parquet(tmp_path / "rows.parquet")
        with pytest.raises(AdapeftError, match=rf"row 1 .* is not an image: .*({message})"):
            tokenized(folder, data_of(tmp_path / "rows.parquet"))
    rows = datasets.Dataset.from_dict({"image": [b"a", b"b"], "labels": ["a", "b"]})
    rows.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(AdapeftError, match=r"all 2 rows are dropped; the first is row 0: .* is not an image"):
        tokenized(folder, data_of(tmp_path / "rows.parquet", invalid="drop"))


def test_columns_that_hold_no_images_are_refused(tmp_path):
    for values in ([[1, 2], [3]], [1, 2], [{"path": "a"}, {"path": "b"}]):
        rows = [{"image": value, "labels": label} for value, label in zip(values, "ab", strict=True)]
        path = write_lines(tmp_path / "rows.jsonl", rows)
        with pytest.raises(AdapeftError, match=r"data\.image = 'image': this column of data\.train has type"):
            describe(TASK, data_of(path))
    with pytest.raises(AdapeftError, match=r"data\.image = 'picture': data\.train has no such column"):
        describe(TASK, data_of(path, image="picture"))


def test_the_loss_is_that_of_the_model(folder):
    model, data = make_model(folder), tokenized(folder, data_of(folder / "rows.jsonl"))
    check_own_loss(TASK.objective(describe(TASK, data_of(folder / "rows.jsonl"))), data.collate(range(9)), model)
    assert task_of(model) == "image-classification"
    assert repeated_token(model.config, ImageClasses(), 2, 1).inputs["pixel_values"].shape == (2, 3, 8, 8)


def test_a_model_for_images_of_another_size_is_refused(folder, tmp_path):
    write_vit(tmp_path / "vit", image_size=12)
    for place, is_refused in ((folder, False), (tmp_path, True)):
        weightless = Weightless()
        with weightless:
            structure = build_structure(make_model(folder).config, TASK.name)
        data = data_of(folder / "rows.jsonl")
        if is_refused:
            with pytest.raises(AdapeftError, match=r"the model rejects images of shape \[3, 12, 12\]"):
                check_images(structure, weightless, tokenized(place, data))
        else:
            check_images(structure, weightless, tokenized(place, data))


def test_sampled_classes_have_the_exact_gauss_newton_form_as_mean(folder):
    """The mean over draws of n (g̃·d)² is dᵀJᵀHJd, of a whole model in float64."""
    model = in_double(make_model(folder))
    model.set_attn_implementation("eager")  # the fused kernel has no forward derivative
    found = tokenized(folder, data_of(folder / "rows.jsonl")).collate([0, 1, 2, 3])
    batch = Batch({"pixel_values": found.inputs["pixel_values"].double()}, found.labels, found.ids)
    check_curvature_of_classes(model, ImageClasses(), batch)


def test_select_takes_batches_of_images(folder):
    data = tokenized(folder, data_of(folder / "rows.jsonl"))
    batches = [{**data.collate(order).inputs, "labels": data.collate(order).labels} for order in ([0, 1, 2], [3, 4, 5])]
    assert 0 < adapeft.select(make_model(folder), batches, budget=100, warmup_steps=0).count <= 100
