"""MLflow; its environment variables, such as ``MLFLOW_TRACKING_URI`` and ``MLFLOW_EXPERIMENT_NAME``, keep theirs."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.tracking.tracker import TrackedRun


class MLflow:
    """A run of MLflow, active in the thread that started it."""

    def start(self, run: TrackedRun) -> str:
        import mlflow
        from mlflow.utils.validation import MAX_PARAMS_TAGS_PER_BATCH

        started = mlflow.start_run(run_id=run.known, run_name=None if run.known else run.name)
        if run.known is None:  # a parameter cannot change, and a resumed run may have another cluster section
            items = list(run.config.items())
            for first in range(0, len(items), MAX_PARAMS_TAGS_PER_BATCH):
                mlflow.log_params(dict(items[first : first + MAX_PARAMS_TAGS_PER_BATCH]))
        return started.info.run_id

    def log(self, values: Mapping[str, float], step: int) -> None:
        import mlflow

        mlflow.log_metrics(dict(values), step=step)

    def finish(self, *, failed: bool) -> None:
        import mlflow

        mlflow.end_run("FAILED" if failed else "FINISHED")
