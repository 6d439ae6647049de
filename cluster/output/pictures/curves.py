"""Curves of the training: loss and metric against steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.ticker import MaxNLocator

from cluster.output.measured import PredictedDecrease
from cluster.output.pictures.picture import Picture, new_figure, png_of


def draw_loss(metrics: Mapping[str, Any], training: Mapping[int, float]) -> Picture:
    """Draw the loss of the evaluations and of training.

    Args:
        metrics: content of ``metrics.json`` of a trained run.
        training: training loss by step, from the run's events; may be empty.
    """
    figure = new_figure(3.0)
    axes = figure.subplots()
    if training:
        axes.plot(list(training), list(training.values()), color="0.6", label="training")
    _draw_evaluations(axes, metrics, "loss")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(frameon=False)
    caption = "Loss on the evaluation data by training step; step 0 is the base model, the star is what was kept."
    if training:
        caption += " Gray: loss of the training batches, as logged."
    return Picture("loss", "Loss", caption, png_of(figure))


def draw_metric(metrics: Mapping[str, Any]) -> Picture | None:
    """Draw the metric that selects the best evaluation; None if it is the loss, which has its own figure."""
    name = metrics["metric"]
    if name == "loss":
        return None
    figure = new_figure(3.0)
    axes = figure.subplots()
    _draw_evaluations(axes, metrics, name)
    axes.set(xlabel="step", ylabel=name)
    caption = f"{name} on the evaluation data by training step; step 0 is the base model, the star is what was kept."
    return Picture("metric", f"Metric: {name}", caption, png_of(figure))


def draw_prediction(metrics: Mapping[str, Any], predicted: PredictedDecrease) -> Picture:
    """Draw the measured decrease of the loss, and the decrease that was predicted for the whole training.

    Args:
        metrics: content of ``metrics.json`` of a run that trained nothing outside the budget: the influence is the
            decrease beyond that.
        predicted: predicted decrease within the reach of the training.
    """
    start, last = metrics["before"]["loss"], metrics["num_steps"]
    points = {0: 0.0, **{scores["step"]: start - scores["loss"] for scores in metrics["history"]}}
    figure = new_figure(3.0)
    axes = figure.subplots()
    axes.plot(list(points), list(points.values()), color="C0", marker="o", markersize=4, label="measured")
    is_possible = predicted.value <= start
    if is_possible:
        axes.plot(last, predicted.value, "D", color="C3", markersize=8, label="predicted")
    if predicted.at_once is not None:
        axes.plot(last, predicted.at_once, "D", color="C3", markersize=8, fillstyle="none", label="in one step of all")
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(xlabel="step", ylabel="decrease of the loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    reached = points[max(points)]
    caption = (
        "Decrease of the loss on the evaluation data by training step, and the influence of the choice, which predicts "
        "the decrease of the whole training from calibration examples of the training data: "
        f"{predicted.text}, {reached:.3g} measured after the last step."
        + (" The sum counts groups that change the outputs alike as if each were alone." if predicted.adds_up else "")
        + ("" if is_possible else " It is more than the loss itself, and not drawn.")
    )
    return Picture("prediction", "Predicted and measured", caption, png_of(figure))


def _draw_evaluations(axes: Any, metrics: Mapping[str, Any], name: str) -> None:
    points = {0: metrics["before"][name], **{scores["step"]: scores[name] for scores in metrics["history"]}}
    axes.plot(list(points), list(points.values()), color="C0", marker="o", markersize=4, label="evaluation")
    if "best_step" in metrics:  # runs of earlier versions do not say which was kept
        axes.plot(metrics["best_step"], metrics["after"][name], "*", color="C3", markersize=13, label="kept")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
