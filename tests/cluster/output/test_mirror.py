"""Mirroring a run folder to a URL: a bucket on a local S3 server, a folder, or memory."""

from __future__ import annotations

import io
import tarfile

import fsspec
import pytest

from adapeft.errors import AdapeftError
from cluster.failure import WorkerError
from cluster.output import mirror as mirrors
from cluster.output.mirror import Mirror, fetched
from cluster.output.place import working_folder


@pytest.fixture(params=["memory", "folder", "bucket"])
def url(request, tmp_path, monkeypatch):
    """Return a URL without files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if request.param == "bucket":
        yield f"{request.getfixturevalue('bucket')}/runs/mine"
    elif request.param == "folder":
        yield f"file://{tmp_path}/storage/runs/mine"
    else:
        yield "memory://bucket/runs/mine"
        fsspec.filesystem("memory").store.clear()


@pytest.fixture
def other_machine(tmp_path, monkeypatch):
    """Simulate another machine: switch to its cache, which is empty or as it was left."""

    def move(name: str) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))

    return move


def write(url: str, name: str, text: str) -> None:
    path = working_folder(url) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def read(url: str) -> dict[str, str]:
    """Return the texts of all files in the folder on this machine, without hidden files."""
    folder = working_folder(url)
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


def stored(url: str) -> list[str]:
    files, root = fsspec.url_to_fs(url, use_listings_cache=False)
    return sorted(path.removeprefix(root + "/") for path in files.find(root))


RUN = {
    "config.yaml": "output: there",
    "checkpoints/latest": "step-10",
    "checkpoints/step-10/rank-0": "zero",
    "checkpoints/step-10/rank-1": "one",
    "logs/events.jsonl": "{}",
}


def test_another_machine_goes_on_and_the_first_takes_that_up(url, other_machine):
    for name, text in RUN.items():
        write(url, name, text)
    Mirror(url).put()
    assert stored(url) == ["checkpoints.tar", "config.yaml", "logs/events.jsonl"]

    other_machine("second")
    there = Mirror(url)
    there.fetch()
    assert read(url) == RUN
    write(url, "checkpoints/latest", "step-20")
    (working_folder(url) / "checkpoints" / "step-10" / "rank-0").unlink()
    write(url, "delta.safetensors", "values")
    there.put()

    other_machine("cache")
    Mirror(url).fetch()
    gone = "checkpoints/step-10/rank-0"
    assert read(url) == {name: text for name, text in RUN.items() if name != gone} | {
        "checkpoints/latest": "step-20",
        "delta.safetensors": "values",
    }


def test_what_was_made_here_and_not_yet_put_stays(url):
    write(url, "config.yaml", "one")
    Mirror(url).put()
    write(url, "config.yaml", "two, and a machine that died")
    Mirror(url).fetch()
    assert read(url) == {"config.yaml": "two, and a machine that died"}


def test_only_what_has_changed_is_put(url, monkeypatch):
    for name, text in RUN.items():
        write(url, name, text)
    mirror, sent, send = Mirror(url), [], Mirror._send
    monkeypatch.setattr(Mirror, "_send", lambda self, path, name: sent.append(name) or send(self, path, name))
    mirror.put()
    assert sorted(sent) == stored(url)
    sent.clear()
    write(url, "logs/events.jsonl", "{}{}")
    mirror.put()
    Mirror(url).put()
    assert sent == ["logs/events.jsonl"]


def test_what_is_removed_on_one_side_is_removed_on_the_other(url, other_machine):
    write(url, "config.yaml", "one")
    write(url, "partial-sums/rank-0", "sums")
    Mirror(url).put()
    other_machine("second")
    there = Mirror(url)
    there.fetch()
    (working_folder(url) / "partial-sums" / "rank-0").unlink()
    (working_folder(url) / "partial-sums").rmdir()
    there.put()
    assert stored(url) == ["config.yaml"]
    other_machine("cache")
    Mirror(url).fetch()
    assert read(url) == {"config.yaml": "one"}


def test_a_copy_is_what_the_storage_has_whatever_was_made_here(url, other_machine):
    for name, text in RUN.items():
        write(url, name, text)
    Mirror(url).put()
    other_machine("second")
    Mirror(url).fetch()
    write(url, "checkpoints/step-20/rank-0", "made here")
    write(url, "config.yaml", "made here")
    write(url, "delta.safetensors", "made here")
    Mirror(url).fetch()
    assert read(url)["config.yaml"] == "made here"
    Mirror(url).fetch(over=True)
    assert read(url) == RUN
    before = stored(url)
    Mirror(url).put()
    assert stored(url) == before


def test_two_machines_at_one_url_are_told_apart(url, other_machine):
    for name, text in RUN.items():
        write(url, name, text)
    first = Mirror(url)
    first.put()

    other_machine("second")
    second = Mirror(url)
    second.fetch()
    write(url, "config.yaml", "the second's")
    write(url, "metrics.json", "the second's")
    second.put()

    other_machine("cache")
    write(url, "logs/events.jsonl", "both may grow what the other leaves alone")
    first.put()
    for name in ("metrics.json", "config.yaml"):
        write(url, name, "the first's own")
        with pytest.raises(AdapeftError, match=rf"another machine has written {name} there in the meantime"):
            first.put()
        assert first.has_failed
        (working_folder(url) / name).unlink()
    other_machine("third")
    Mirror(url).fetch()
    assert read(url)["config.yaml"] == read(url)["metrics.json"] == "the second's"


def test_what_is_being_written_is_left_for_the_next_time(url, monkeypatch):
    """A rank removes a checkpoint or adds to it while the mirror packs it."""
    write(url, "checkpoints/step-10/rank-0", "zero")
    mirror, add = Mirror(url), tarfile.TarFile.add

    def add_meanwhile(*arguments, **options):
        add(*arguments, **options)
        write(url, "checkpoints/step-20/rank-0", "more")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "add", add_meanwhile)
        mirror.put()
    assert stored(url) == []
    mirror.put()
    assert stored(url) == ["checkpoints.tar"]


def test_a_checkpoint_comes_after_what_was_written_before_it(url, monkeypatch):
    """While the folder is uploaded, a rank saves the best delta and then the checkpoint that refers to it."""
    write(url, "delta.safetensors", "of step 10")
    write(url, "checkpoints/latest", "step-10")
    mirror, sent, send = Mirror(url), [], Mirror._send

    def send_meanwhile(self, path, name):
        if not sent:
            write(url, "delta.safetensors", "the best, of step 20")
            write(url, "checkpoints/latest", "step-20")
        sent.append(name)
        return send(self, path, name)

    monkeypatch.setattr(Mirror, "_send", send_meanwhile)
    mirror.put()
    assert sent == ["delta.safetensors", "delta.safetensors", "checkpoints.tar"]
    assert fsspec.open(f"{url}/delta.safetensors", "r").open().read() == "the best, of step 20"


@pytest.fixture
def refusing(monkeypatch):
    """Make the first ``count`` puts fail with ``error``; return the list of pauses, which are skipped."""

    def refuse(mirror: Mirror, count: int, error: Exception) -> list[float]:
        pauses: list[float] = []
        put, refused = mirror._files.put_file, []

        def put_file(*arguments, **options):
            if len(refused) < count:
                refused.append(True)
                raise error
            return put(*arguments, **options)

        monkeypatch.setattr(mirror._files, "put_file", put_file)
        mirror._pause = pauses.append
        return pauses

    return refuse


def test_a_storage_error_that_passes(url, refusing):
    write(url, "config.yaml", "one")
    mirror = Mirror(url)
    pauses = refusing(mirror, 2, OSError("503 Slow Down"))
    mirror.put()
    assert stored(url) == ["config.yaml"]
    assert pauses == [1.0, 2.0]


def test_a_server_that_refuses_the_first_two_puts(bucket, s3_server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = f"{bucket}/run"
    write(url, "config.yaml", "one")
    s3_server.refusals = 2
    Mirror(url).put()
    assert s3_server.refusals == 0
    assert stored(url) == ["config.yaml"]


def test_a_storage_error_that_stays(url, refusing):
    write(url, "config.yaml", "one")
    mirror = Mirror(url)
    pauses = refusing(mirror, 99, OSError("503 Slow Down"))
    with pytest.raises(WorkerError) as failure:
        mirror.put()
    assert len(pauses) == len(mirrors._PAUSES)
    message = str(failure.value)
    assert message.startswith(f"{url}: cannot be written (OSError: 503 Slow Down). Check the URL")
    assert f"are in {working_folder(url)}; the same command resumes from them" in message
    assert read(url) == {"config.yaml": "one"}


def test_what_a_user_has_to_mend_is_not_tried_again(url, refusing):
    write(url, "config.yaml", "one")
    mirror = Mirror(url)
    pauses = refusing(mirror, 99, PermissionError("Access Denied"))
    with pytest.raises(AdapeftError, match=r"cannot be written \(PermissionError: Access Denied\)"):
        mirror.put()
    assert pauses == []


def test_a_bucket_that_is_not_there_is_not_made(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = "s3://mistyped/runs/mine"
    write(url, "config.yaml", "one")
    with pytest.raises(AdapeftError, match="s3://mistyped/runs/mine: cannot be written"):
        Mirror(url).put()


def test_an_unknown_protocol():
    with pytest.raises(AdapeftError, match="s4://bucket/run: Protocol not known: s4"):
        Mirror("s4://bucket/run")


def test_a_password_in_the_url():
    with pytest.raises(AdapeftError, match="output: the URL holds a password") as refusal:
        Mirror("s3://id:hidden@bucket/run")
    assert "hidden" not in str(refusal.value)


def test_nothing_at_a_url(url):
    with pytest.raises(AdapeftError, match="nothing is there"):
        fetched(url)


def test_of_some_names_only_those_are_fetched(url, other_machine):
    for name in ("groups.parquet", "statistics/rank-0", "delta.safetensors"):
        write(url, name, name)
    Mirror(url).put()
    other_machine("second")
    folder = fetched(url, ("groups.parquet", "options.parquet", "statistics"))
    assert folder == working_folder(url)
    assert sorted(read(url)) == ["groups.parquet", "statistics/rank-0"]


def test_a_hostile_archive_stays_in_its_folder(url):
    files, root = fsspec.url_to_fs(url)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        member = tarfile.TarInfo("../../../outside")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    if url.startswith("file"):
        files.makedirs(root)
    files.pipe_file(f"{root}/checkpoints.tar", content.getvalue())
    with pytest.raises((AdapeftError, WorkerError), match="outside"):
        Mirror(url, pause=lambda seconds: None).fetch()
    assert not list(working_folder(url).parent.rglob("outside"))
