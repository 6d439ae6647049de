"""Workers as processes of this machine, started in seconds and without Ray."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist
from tqdm import tqdm

from adapeft.config.config import Config
from adapeft.errors import AdapeftError
from adapeft.sections.cluster import Cluster
from cluster.events import Report
from cluster.launch.cause import Failure, worker_error
from cluster.launch.forks import prepare, worker_environment
from cluster.launch.launcher import Launcher, Outcome, Workers
from cluster.launch.resources import environment_of, room_in
from cluster.launch.stage import Stage
from cluster.output.folder import RunFolder

_GRACE_SECONDS = 10.0
"""Time that the other ranks have to report their errors after the first failure."""


class LocalLauncher(Launcher):
    """Launcher whose workers are processes of this machine.

    Args:
        cluster: number, resources and settings of the workers.
        run_id: identity of the run in logs.
    """

    def __init__(self, cluster: Cluster, run_id: str) -> None:
        super().__init__(cluster, run_id)
        prepare(cluster)

    def room(self) -> int:
        there = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
        return room_in(self.cluster, there)

    def _start(self, config: Config, watch: Report) -> Workers:
        return _Processes(config)


class _Processes(Workers):
    """Worker processes, with one connection per process."""

    def __init__(self, config: Config) -> None:
        self.cluster = config.cluster
        self._logs = RunFolder.of(config).logs
        context: Any = multiprocessing.get_context("spawn" if self.cluster.gpus_per_worker else "forkserver")
        # This process hosts the store, so no other can take the port between choosing and using it.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._connections: list[Connection] = []
        self._processes = []
        with worker_environment(self.cluster):
            for rank in range(self.cluster.workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(rank, self.cluster, self._store.port, theirs))
                process.start()
                theirs.close()
                self._connections.append(ours)
                self._processes.append(process)

    def run(self, stage: Stage, watch: Report) -> dict[str, Any]:
        content = cloudpickle.dumps(stage)
        for connection in self._connections:
            # A worker that is already gone is detected below.
            with contextlib.suppress(OSError):
                connection.send_bytes(content)
        outcome = Outcome(watch)
        running = dict(enumerate(self._connections))
        failures: dict[int, Failure] = {}
        deadline = float("inf")
        while running and time.monotonic() < deadline:
            ready = wait(list(running.values()), timeout=min(0.5, max(0.0, deadline - time.monotonic())))
            for rank in [rank for rank, connection in running.items() if connection in ready]:
                try:
                    event = running[rank].recv()
                except (EOFError, OSError):
                    event = {"failed": self._end_of(rank)}
                if "failed" in event:
                    failures[rank] = event["failed"]
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
                else:
                    outcome.take(event)
                if rank in failures or rank in outcome.ended:
                    del running[rank]
        outcome.check_not_refused()
        if failures:
            raise worker_error([failures[rank] for rank in sorted(failures)], self._logs)
        return outcome.result

    def close(self, *, is_idle: bool) -> None:
        if is_idle:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.send_bytes(b"")
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join(_GRACE_SECONDS if is_idle else 0.0)
            process.kill()
            process.join()
            connection.close()

    def _end_of(self, rank: int) -> Failure:
        process = self._processes[rank]
        process.join(_GRACE_SECONDS)
        status = process.exitcode
        how = f"by {signal.Signals(-status).name}" if status is not None and status < 0 else f"with status {status}"
        return Failure("WorkerError", f"rank {rank} ended {how}", is_lost=True)


def _serve(rank: int, cluster: Cluster, port: int, connection: Connection) -> None:
    """Run stages on a worker until the connection sends an empty message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the launching process handles it
    threading.Thread(target=end_with_parent, daemon=True).start()
    _silence()
    tqdm.set_lock(threading.RLock())  # the default is a semaphore, for which a killed worker leaves a warning
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(cluster.workers),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        **environment_of(cluster),
    )
    torch.set_num_threads(cluster.cpus_per_worker)
    machine = socket.gethostname()
    status = 0
    try:
        dist.init_process_group(
            "nccl" if cluster.gpus_per_worker else "gloo",
            store=dist.TCPStore("127.0.0.1", port, is_master=False),
            rank=rank,
            world_size=cluster.workers,
            timeout=timedelta(seconds=cluster.collective_timeout),
        )
        while content := connection.recv_bytes():
            cloudpickle.loads(content).run(rank, machine, connection.send)
    except AdapeftError:  # already sent by the stage
        status = 1
    except BaseException as error:
        status = 1
        connection.send({"failed": Failure(type(error).__name__, str(error))})
    sys.exit(status)


def end_with_parent() -> None:
    """Exit this process when the launching process has exited for any reason."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _silence() -> None:
    """Discard output that libraries write between stages; during a stage it goes to the log."""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
