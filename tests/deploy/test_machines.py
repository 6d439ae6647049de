"""The image, clusters of virtual machines, Slurm and the ready configs, each checked by the program that reads it."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from adapeft.config.load import load_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SBATCH = DEPLOY / "slurm" / "adapeft.sbatch"
CLUSTERS = sorted((DEPLOY / "vm").glob("*.yaml"))
CONFIGS = [*sorted((DEPLOY / "configs").glob("*.yaml")), DEPLOY / "demo" / "demo.yaml"]


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_ready_configs(path):
    is_open = "???" in path.read_text(encoding="utf-8")
    config = load_config(path, ["model.name=some/model"] if is_open else [])
    micro, workers = config.train.micro_batch_size, config.cluster.workers
    assert config.train.batch_size % (workers * (micro or 1)) == 0
    assert config.select.batch_size % (workers * (config.select.micro_batch_size or 1)) == 0


# --- the image -------------------------------------------------------------------------------------------------------


def instructions() -> list[str]:
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_the_image_is_made_of_what_is_here():
    copied = [
        source
        for line in instructions()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    assert {"constraints.txt", "pyproject.toml", "solver", "adapeft", "cluster"} <= set(copied)
    assert all((ROOT / source).exists() for source in copied)


def test_the_image_is_pinned():
    installs = [line for line in instructions() if "pip install" in line]
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in install for install in installs)
    assert "3.11" in instructions()[0]
    assert "Python 3.11" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_the_image_has_what_the_launchers_call():
    (packages,) = [line for line in instructions() if "apt-get install" in line]
    assert {"g++", "openssh-client", "rsync", "wget"} <= set(packages.split())


def test_the_image_does_not_run_as_root():
    stages = "\n".join(instructions()).split("FROM ")
    user = re.search(r"^USER (\d+):", stages[-1], re.MULTILINE)
    assert user is not None
    assert int(user[1]) > 0
    assert "pip install" not in stages[-1], "what builds is in the other stage"


# --- ray up ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_ray_accepts_the_cluster(path):
    """Check with the published schema and with the steps of Ray that precede calls to a cloud."""
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text(encoding="utf-8"))
    cluster = yaml.safe_load(path.read_text(encoding="utf-8"))
    jsonschema.validate(cluster, schema)
    validate_config(prepare_config(cluster))
    with pytest.raises(jsonschema.ValidationError, match="file_mount'"):
        jsonschema.validate({**cluster, "file_mount": {}}, schema)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_the_cluster_asks_for_a_token_and_hides_its_dashboard(path):
    cluster = yaml.safe_load(path.read_text(encoding="utf-8"))
    head = [line for line in cluster["head_start_ray_commands"] if "ray start" in line]
    workers = [line for line in cluster["worker_start_ray_commands"] if "ray start" in line]
    assert all("RAY_AUTH_MODE=token ray start" in line for line in head + workers)
    assert all("--dashboard-host=127.0.0.1" in line for line in head)
    assert "~/.ray/auth_token" in cluster["file_mounts"].values()
    assert "RAY_AUTH_TOKEN=" not in path.read_text(encoding="utf-8")
    assert "0.0.0.0/0" not in path.read_text(encoding="utf-8")
    assert "privileged" not in str(cluster["docker"])


# --- Slurm -----------------------------------------------------------------------------------------------------------


def slurm(tmp_path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script as sbatch would, with an ``srun`` that prints its arguments and mode and size of the token."""
    shims = tmp_path / "shims"
    shims.mkdir()
    for name, body in {
        "scontrol": "echo node-a; echo node-b",
        "srun": 'if [[ $* == *hostname* ]]; then echo 10.0.0.1 fe80::1; exit; fi\necho "srun $*"\n'
        'stat -c "token %a %s" "$RAY_AUTH_TOKEN_PATH"',
    }.items():
        (shims / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (shims / name).chmod(0o755)
    return subprocess.run(
        ["bash", str(SBATCH), *map(str, arguments)],
        env={
            **os.environ,
            "PATH": f"{shims}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"},
            "SLURM_CPUS_ON_NODE": "16",
            "ADAPEFT_TOKENS": str(tmp_path / "tokens"),
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_slurm_script_starts_ray_on_every_node(tmp_path):
    done = slurm(tmp_path, DEPLOY / "configs" / "several-nodes.yaml", "output=/scratch/my run")
    assert done.returncode == 0, done.stderr
    assert "--nodes=2 --ntasks=2" in done.stdout
    assert "ray symmetric-run --address 10.0.0.1:6379 --min-nodes 2 --num-cpus 16 -- env RAY_ADDRESS=10.0.0.1:6379" in (
        done.stdout
    )
    assert done.stdout.splitlines()[0].endswith("several-nodes.yaml output=/scratch/my run")
    assert "token 600 64" in done.stdout
    assert not list((tmp_path / "tokens").iterdir()), "the token goes with the job"


def test_the_slurm_script_refuses_before_it_waits_for_nodes(tmp_path):
    done = slurm(tmp_path, DEPLOY / "configs" / "several-nodes.yaml", "bugdet=1%")
    assert done.returncode == 2
    assert "Did you mean 'select.budget'?" in done.stderr
    assert "srun" not in done.stdout


def test_the_slurm_script_is_sound_bash():
    assert subprocess.run(["bash", "-n", str(SBATCH)], check=False).returncode == 0
    assert SBATCH.stat().st_mode & stat.S_IXUSR
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", str(SBATCH)], check=True)


# --- the guide -------------------------------------------------------------------------------------------------------


def test_the_guide_names_files_that_are_there():
    named = set(re.findall(r"deploy/[\w./-]+\w", (DEPLOY / "README.md").read_text(encoding="utf-8")))
    assert {"deploy/Containerfile", "deploy/kubernetes/cluster.yaml", "deploy/slurm/adapeft.sbatch"} <= named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
