"""Runs as Ray jobs: uploaded files, refused input, and one real job with token authentication."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import requests
import yaml
from ray.job_submission import JobDetails, JobStatus

from adapeft.config.keys import differences, measurement_key
from adapeft.config.load import load_config, parse_config, read_config
from adapeft.errors import AdapeftError
from cluster.commands.jobs import dashboard, jobs, package, submit
from cluster.commands.jobs.package import pack
from cluster.failure import WorkerError
from cluster.output.folder import RunFolder
from cluster.output.identity import run_id
from tests.support.checkpoints import COMMAND, adapeft, write_bert, write_colours, write_config


class FakeClient:
    """Keeps jobs in memory; ``chunks`` are the pieces in which the log of every job arrives."""

    def __init__(self, *statuses: JobStatus, chunks: tuple[str | Exception, ...] = ()) -> None:
        self.jobs: dict[str, JobDetails] = {}
        self.statuses = list(statuses)
        self.logs = [chunks]
        self.sent: dict[str, str] = {}

    def list_jobs(self) -> list[JobDetails]:
        return list(self.jobs.values())

    def submit_job(self, *, submission_id, entrypoint, runtime_env, metadata, entrypoint_num_cpus) -> str:
        self.sent = _texts(Path(runtime_env["working_dir"]))
        self.environment, self.num_cpus = runtime_env["env_vars"], entrypoint_num_cpus
        self.jobs[submission_id] = details(JobStatus.RUNNING, submission_id, entrypoint=entrypoint, metadata=metadata)
        return submission_id

    def get_job_info(self, job: str) -> JobDetails:
        if job not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {job} does not exist.")
        if self.statuses:
            self.jobs[job].status = self.statuses.pop(0)
        return self.jobs[job]

    async def tail_job_logs(self, job: str):
        for chunk in self.logs[0] if len(self.logs) == 1 else self.logs.pop(0):
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    def stop_job(self, job: str) -> bool:
        self.jobs[job].status = JobStatus.STOPPED
        return True


def _texts(folder: Path) -> dict[str, str]:
    """Return the texts of all files in a folder, following links as Ray does when it zips a folder."""
    found = {}
    for base, _, names in os.walk(folder, followlinks=True):
        for name in names:
            path = Path(base, name)
            found[str(path.relative_to(folder))] = path.read_text()
    return found


def details(status: JobStatus, job: str = "mine-1", **more) -> JobDetails:
    return JobDetails(type="SUBMISSION", submission_id=job, status=status, **{"entrypoint": "adapeft run", **more})


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return a user's folder with data, a model in a subfolder, and private files that must not be uploaded."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text("{}")
    for name in ("train", "validation"):
        (folder / "data" / f"{name}.jsonl").write_text(f"{name}\n")
    (folder / ".env").write_text("HF_TOKEN=hf_secret")
    (folder / ".gitignore").write_text("data/\n")
    monkeypatch.chdir(folder)
    return folder


def config_of(**changes):
    tree = {
        "model": {"name": "base", "task": "causal-lm"},
        "data": {"train": "data/train.jsonl", "evaluation": "data/validation.jsonl"},
        "output": "/shared/runs/mine",
    }
    return parse_config({**tree, **changes})


# --- uploaded files --------------------------------------------------------------------------------------------------


def test_the_config_and_what_it_names_travel_and_nothing_else(project, tmp_path):
    client = FakeClient()
    job = submit.submit(client, pack(config_of(), project, is_here=False), {"HF_HUB_OFFLINE": "1"}, num_cpus=2)
    names = {"config.yaml", "base/config.json", "data/train.jsonl", "data/validation.jsonl"}
    assert set(client.sent) == names
    assert client.sent["data/train.jsonl"] == "train\n"
    assert yaml.safe_load(client.sent["config.yaml"])["data"]["train"] == "data/train.jsonl"
    assert client.environment == {"HF_HUB_OFFLINE": "1"}
    assert client.num_cpus == 2
    sent = client.jobs[job]
    assert sent.entrypoint == "adapeft run config.yaml"
    assert sent.metadata.items() >= {"output": "/shared/runs/mine", "model": "base", "budget": "0.5%"}.items()


def test_a_file_in_a_folder_that_travels_is_not_linked_into_it(project, tmp_path):
    (project / "base" / "train.txt").write_text("words")
    data = {"train": "base/train.txt", "evaluation": "data/validation.jsonl"}
    pack(config_of(data=data), project, is_here=False).write(tmp_path)
    assert (tmp_path / "base" / "train.txt").read_text() == "words"
    assert not (project / "base" / "train.txt").is_symlink()


def test_of_another_run_only_its_measurements_travel(project):
    run = project / "runs" / "old"
    (run / "checkpoints").mkdir(parents=True)
    for name in ("groups.parquet", "checkpoints/large"):
        (run / name).write_text("")
    packed = pack(config_of(select={"statistics": "runs/old"}), project, is_here=False)
    assert [name for name in packed.files if name.startswith("runs")] == ["runs/old/groups.parquet"]
    assert packed.config.select.statistics == "runs/old"


def test_what_is_outside_has_to_be_seen_from_the_cluster(project, tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    data = {"train": "../train.jsonl", "evaluation": "/shared/validation.jsonl"}
    packed = pack(config_of(data=data), project, is_here=False)
    assert packed.config.data.train == str(tmp_path / "train.jsonl")
    assert "data.train" in packed.unseen[0]
    assert "data.evaluation = /shared/validation.jsonl" in packed.unseen[1]
    with pytest.raises(AdapeftError, match=r"data\.evaluation = /shared/validation\.jsonl: no such file"):
        pack(config_of(data=data), project, is_here=True)


def test_what_is_nowhere_is_refused(project):
    data = {"train": "data/tarin.jsonl", "evaluation": "data/validation.jsonl"}
    with pytest.raises(AdapeftError, match=r"data\.train = data/tarin\.jsonl: no such file or folder here"):
        pack(config_of(data=data), project, is_here=False)


def test_a_relative_output_is_for_a_cluster_on_this_machine(project):
    with pytest.raises(AdapeftError, match=r"output = runs/mine: the cluster is on another machine.*absolute path"):
        pack(config_of(output="runs/mine"), project, is_here=False)
    assert pack(config_of(output="runs/mine"), project, is_here=True).config.output == str(project / "runs/mine")
    assert pack(config_of(output="s3://runs/mine"), project, is_here=False).config.output == "s3://runs/mine"


def test_too_much_to_travel(project, monkeypatch):
    monkeypatch.setattr(package, "MOST_BYTES", 2**20)
    (project / "base" / "model.safetensors").write_bytes(b"0" * 2**20)
    with pytest.raises(AdapeftError, match=r"^base: 1 MiB of the 1 MiB to send, and Ray accepts at most 1 MiB"):
        pack(config_of(), project, is_here=False)


def test_secrets_stay_here(project):
    packed = pack(config_of(), project, is_here=False)
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "db_password"):
        with pytest.raises(AdapeftError, match=f"--env {name}: looks like a secret"):
            submit.submit(FakeClient(), packed, {name: "x"})
    with pytest.raises(AdapeftError, match="--env HTTPS_PROXY: looks like a secret"):
        submit.submit(FakeClient(), packed, {"HTTPS_PROXY": "http://me:pass@proxy:3128"})
    with pytest.raises(AdapeftError, match="output: the URL holds a password") as error:
        pack(config_of(output="s3://id:hidden@bucket/run"), project, is_here=False)
    assert "hidden" not in str(error.value)
    submit.submit(FakeClient(), packed, {"TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"})


# --- attempts --------------------------------------------------------------------------------------------------------


def test_the_same_run_again_is_refused_while_it_lasts_and_counted_afterwards(project):
    client, packed = FakeClient(), pack(config_of(), project, is_here=False)
    first = submit.submit(client, packed, {})
    assert first == run_id(packed.config)
    assert first.startswith("mine-")
    with pytest.raises(AdapeftError, match=rf"job {first} writes there and is running.*adapeft stop {first}"):
        submit.submit(client, packed, {})
    other = pack(config_of(seed=1), project, is_here=False)
    with pytest.raises(AdapeftError, match=f"job {first} writes there"):
        submit.submit(client, other, {})
    client.jobs[first].status = JobStatus.FAILED
    joined = details(JobStatus.RUNNING, None, job_id="03000000", metadata=client.jobs[first].metadata)
    client.jobs["joined"] = joined
    with pytest.raises(AdapeftError, match=r"job 03000000 writes there and is running\. It was not submitted"):
        submit.submit(client, packed, {})
    assert [job.submission_id for job in jobs.runs(client)] == [first]
    joined.status = JobStatus.SUCCEEDED
    second = submit.submit(client, packed, {})
    assert second == f"{first}-2"
    assert client.jobs[second].metadata["attempt"] == "2"
    client.jobs[second].status = JobStatus.STOPPED
    assert not submit.submit(client, other, {}).startswith(first)
    assert run_id(other.config) != first


def test_a_job_that_the_cluster_does_not_take(project, monkeypatch):
    client = FakeClient()

    def submit_job(**job):
        raise RuntimeError(
            "Request failed with status code 500: Traceback\n  File x\nValueError: Job already exists.\n"
        )

    monkeypatch.setattr(client, "submit_job", submit_job)
    with pytest.raises(WorkerError, match=r"refused the job: ValueError: Job already exists\.$"):
        submit.submit(client, pack(config_of(), project, is_here=False), {})


def test_attempts_unpack_their_files_elsewhere_and_are_one_run_all_the_same():
    folders = [f"/tmp/ray/session_{n}/runtime_resources/working_dir_files/_ray_pkg_{n}0af" for n in (1, 2)]
    first, second = (config_of().with_paths({"data.train": f"{folder}/data/train.jsonl"}) for folder in folders)
    assert first != second
    assert differences(first, second) == []
    assert measurement_key(first) == measurement_key(second)
    moved = second.with_paths({"data.train": f"{folders[1]}/data/other.jsonl"})
    assert differences(first, moved) == ["data.train: data/train.jsonl here, data/other.jsonl there"]


def test_an_output_that_the_job_would_take_with_it_is_refused(tmp_path):
    output = tmp_path / "working_dir_files" / "_ray_pkg_0af" / "runs" / "mine"
    with pytest.raises(AdapeftError, match=r"output = .* is in the job's copy of its working directory"):
        RunFolder(output).claim(config_of(output=str(output)))
    assert not output.exists()


# --- logs and status -------------------------------------------------------------------------------------------------


def test_a_broken_connection_is_taken_up_where_it_broke():
    client = FakeClient(JobStatus.RUNNING, JobStatus.SUCCEEDED)
    client.jobs["mine-1"] = details(JobStatus.RUNNING)
    client.logs = [("one\n", "tw", ConnectionError("gone")), ("one\ntwo\n",), ("one\ntwo\n", "three\n"), ()]
    written: list[str] = []
    assert jobs.follow(client, "mine-1", written.append, pause=0).status == JobStatus.SUCCEEDED
    assert "".join(written) == "one\ntwo\nthree\n"


def test_a_cluster_that_stays_away_is_no_hang():
    client = FakeClient(chunks=(ConnectionError("gone"),))
    client.jobs["mine-1"] = details(JobStatus.RUNNING)
    with pytest.raises(
        WorkerError,
        match=r"lost the connection to the cluster .* may still be running: gone\n`adapeft logs mine-1 --follow`",
    ):
        jobs.follow(client, "mine-1", print, pause=0)


def test_outcomes():
    jobs.check_outcome(details(JobStatus.SUCCEEDED))
    jobs.check_outcome(details(JobStatus.RUNNING))
    with pytest.raises(WorkerError, match="job mine-1 failed: exit code 1"):
        jobs.check_outcome(details(JobStatus.FAILED, driver_exit_code=1, message="exit code 1\nlogs"))
    with pytest.raises(AdapeftError, match="refused on the cluster"):
        jobs.check_outcome(details(JobStatus.FAILED, driver_exit_code=2))
    with pytest.raises(WorkerError, match="the cluster has no command `adapeft`"):
        jobs.check_outcome(details(JobStatus.FAILED, driver_exit_code=127))
    with pytest.raises(WorkerError, match="was stopped"):
        jobs.check_outcome(details(JobStatus.STOPPED))


def test_stopping_and_jobs_that_are_not_there():
    client = FakeClient()
    client.jobs["mine-1"] = details(JobStatus.RUNNING)
    assert jobs.stop(client, "mine-1") == JobStatus.STOPPED
    client.jobs["mine-1"].status = JobStatus.SUCCEEDED
    assert jobs.stop(client, "mine-1") == JobStatus.SUCCEEDED
    with pytest.raises(AdapeftError, match=r"mine-2: no such job. Did you mean 'mine-1'\?"):
        jobs.find(client, "mine-2")


# --- the command -----------------------------------------------------------------------------------------------------


def test_a_bad_config_is_refused_before_any_cluster_is_asked(command, project):
    (project / "run.yaml").write_text("model: {name: base, task: causal-lm}\noutput: x\n")
    status, _, errors = command("submit", "run.yaml", "--address", "http://127.0.0.1:1")
    assert status == 2
    assert "data.train: required" in errors
    assert "127.0.0.1" not in errors


def test_addresses_that_do_not_answer(command, monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")
    status, _, errors = command("status", "x", "--address", "http://me:hidden@127.0.0.1:1")
    assert status == 2
    assert "--address = http://127.0.0.1:1: no Ray dashboard answers there" in errors
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    status, _, errors = command("logs", "x")
    assert status == 2
    assert "RAY_ADDRESS = 127.0.0.1:6379: must be the address of the dashboard" in errors


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ({"ray_version": "2.9.3", "session_name": "s"}, "the cluster runs Ray 2.9.3, and adapeft needs 2.54 or later"),
        ({"hello": "world"}, "the server there is no Ray dashboard"),
        (401, r"the cluster requires a token\. Set RAY_AUTH_MODE=token"),
        (403, "the cluster refuses this token"),
    ],
)
def test_what_answers(answer, complaint, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    timeouts = []

    def request(method, url, **options):
        timeouts.append(options["timeout"])
        response = requests.Response()
        response.status_code = answer if isinstance(answer, int) else 200
        response._content = json.dumps(answer).encode()
        return response

    monkeypatch.setattr(requests, "request", request)
    with pytest.raises(AdapeftError, match=complaint):
        dashboard.connect("http://head:8265")
    assert all(timeouts)


# --- a real cluster --------------------------------------------------------------------------------------------------


@pytest.fixture
def head(tmp_path):
    """Start a head on this machine with a token, on ports that no other Ray uses; return its environment."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    port, web, agent, client = _free_ports(4)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PATH": f"{COMMAND.parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [
            *(str(COMMAND.with_name("ray")), "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"),
            *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--port={port}"),
            *(f"--dashboard-port={web}", f"--dashboard-agent-listen-port={agent}"),
            *(f"--ray-client-server-port={client}", "--min-worker-port=0", "--max-worker-port=0"),
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for_port(web)
        yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{web}"}
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_job_under_token_authentication(head, tmp_path, monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    work = tmp_path / "work"
    work.mkdir()
    write_config(work / "run.yaml", write_bert(work / "base"), *write_colours(work))
    monkeypatch.chdir(work)
    overrides = [
        *("model.name=base", "data.train=train.jsonl", "data.evaluation=validation.jsonl", "cluster.workers=1"),
        *("calibration=32", "warmup_steps=2", "max_steps=2"),
    ]
    job = ("submit", "run.yaml", *overrides)

    stranger = adapeft(*job, RAY_API_SERVER_ADDRESS=head["RAY_API_SERVER_ADDRESS"], HOME=str(tmp_path))
    assert stranger.returncode == 2
    assert "the cluster requires a token" in stranger.stderr

    done = adapeft(*job, timeout=900, **head)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train: step 2: accuracy" in done.stdout
    assert (work / "run" / "delta.safetensors").is_file()
    config = read_config("run.yaml", overrides)
    name = run_id(pack(config, work, is_here=True).config)
    assert f"job {name}: succeeded" in done.stdout
    # The job read its uploaded files, not the files in this folder.
    assert "_ray_pkg_" in load_config(work / "run" / "config.yaml").data.train

    # A changed package is unpacked into another folder, but it is still the same run.
    with (work / "train.jsonl").open("a") as file:
        file.write("\n")
    again = adapeft(*job, timeout=900, **head)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"job {name}-2: succeeded" in again.stdout
    assert "training: already done" in again.stdout

    said = adapeft("status", f"{name}-2", **head)
    assert "succeeded" in said.stdout
    assert str(work / "run") in said.stdout
    everything = done.stdout + again.stdout + said.stdout + adapeft("logs", name, **head).stdout
    assert Path(head["RAY_AUTH_TOKEN_PATH"]).read_text() not in everything

    # `ray job submit` works without `adapeft submit`.
    shutil.rmtree(work / "run")
    plain = subprocess.run(
        [
            *(str(COMMAND.with_name("ray")), "job", "submit", "--working-dir", "."),
            *("--runtime-env-json", '{"env_vars": {"OMP_NUM_THREADS": "1"}}', "--"),
            *("adapeft", "run", "run.yaml", *overrides, f"output={work / 'run'}"),
        ],
        env=head,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert plain.returncode == 0, plain.stdout + plain.stderr
    assert (work / "run" / "delta.safetensors").is_file()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait_for_port(port: int, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
