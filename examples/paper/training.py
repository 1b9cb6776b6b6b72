"""Training from the start, or from the last checkpoint, to the end."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.harness.machine import describe_machine, write_json
from ial_cuda import Hierarchy, median_frequency_weights

from .data import DATA_SETS, Batches, Source, TrainingSet, as_input
from .losses import make_loss
from .networks import NETWORKS
from .processes import Processes
from .recipe import Recipe
from .scores import Scores, evaluate, update_at_logits

CHECKPOINT, LOG, PREDICTIONS = "checkpoint.pt", "log.json", "predictions"
MOMENTUM = 0.9
POLY_POWER = 0.9  # the learning rate is multiplied by (1 - step / steps) ** POLY_POWER
PROGRESS_SECONDS = 0.5  # between updates of the progress bar: each one synchronizes with the GPU


class Training:
    """A network and the state of its training.

    Attributes:
        step: the number of steps taken, of ``steps``.
        network: the network without the wrapper of `Processes.prepare`.
        loss: a `losses.Loss`.
        rows: the rows of the log, one for each call of `record`.
        evaluations: the scores of each evaluation.
    """

    def __init__(
        self,
        recipe: Recipe,
        hierarchy: Hierarchy,
        weight: Tensor | None,
        steps_per_epoch: int,
        processes: Processes,
    ) -> None:
        self.recipe, self.processes = recipe, processes
        self.step, self.steps_per_epoch = 0, steps_per_epoch
        self.steps = recipe.epochs * steps_per_epoch
        self.rows: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []

        torch.manual_seed(recipe.seed)
        self.network = NETWORKS[recipe.network].make(hierarchy.num_classes, recipe.width)
        self.network.to(processes.device)
        if recipe.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self._call = processes.prepare(self.network)

        options = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay, "fused": True}
        if recipe.optimizer == "adam":
            self.optimizer = torch.optim.Adam(self.network.parameters(), **options)
        else:
            self.optimizer = torch.optim.SGD(self.network.parameters(), momentum=MOMENTUM, **options)
        self.schedule = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, self.steps, POLY_POWER)

        weight = None if weight is None else weight.to(processes.device)
        self.loss = make_loss(recipe, hierarchy, weight, processes.group)
        self.scores = Scores(hierarchy).to(processes.device)
        self._start_row()

    def _start_row(self) -> None:
        self.scores.reset()
        self._loss_sum, self._f_sum, self._row_start = 0.0, 0.0, self.step
        self._row_time = time.monotonic()

    def take_step(self, images: Tensor, labels: Tensor) -> None:
        """A step on this process's part of a batch: images (N, h, w, 3), labels (N, h, w), both uint8."""
        # Dropout depends on seed, step and rank alone, so a checkpoint needs no generator state.
        seeds = np.random.SeedSequence((self.recipe.seed, self.step, self.processes.rank))
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        labels = labels.to(self.processes.device, non_blocking=True)
        self.network.train()
        self.optimizer.zero_grad()
        logits = self.logits(images)
        loss, f = self.loss(logits, labels)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self._loss_sum += loss.detach()
        if f is not None:
            self._f_sum += f.mean(0)
        update_at_logits(self.scores, logits.detach(), labels)

    def logits(self, images: Tensor) -> Tensor:
        """The logits of images (N, h, w, 3), uint8."""
        images = as_input(images, self.processes.device)
        if not self.recipe.channels_last:
            images = images.contiguous()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            return self._call(images)

    def describe_progress(self) -> str:
        """The loss of all processes, and mean IoU and factors of this one, since the last row."""
        steps = self.step - self._row_start
        text = f"loss {self._loss_sum.item() / steps:.4f}, IoU {100 * self.scores.mean():.1f} %"
        if isinstance(self._f_sum, Tensor):
            text += ", f " + " ".join(f"{f / steps:.3f}" for f in self._f_sum.tolist())
        return text

    def record(self) -> None:
        """Appends a row: means over all steps since the last row.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        steps = self.step - self._row_start
        loss = self._loss_sum.item() / steps  # of all processes already
        f = None
        if isinstance(self._f_sum, Tensor):
            f = (self.processes.all_reduce(self._f_sum) / (steps * self.processes.world)).tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} in steps {self._row_start} to {self.step - 1}")
        self.rows.append(
            {
                "step": self.step,
                "epoch": self.step / self.steps_per_epoch,
                "learning_rate": self.schedule.get_last_lr()[0],
                "loss": loss,
                "f": f,
                "train_iou": 100 * self.scores.gather(self.processes).mean(),
                "seconds": round(time.monotonic() - self._row_time, 3),
            }
        )
        self._start_row()

    def state(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.as_json(),
            "step": self.step,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rows": self.rows,
            "evaluations": self.evaluations,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Resumes from a state.

        Raises:
            ValueError: the state belongs to another recipe.
        """
        recipe = self.recipe.as_json()
        differing = [name for name, value in recipe.items() if state["recipe"].get(name) != value]
        if differing:
            got, expected = (
                ", ".join(f"{name}={of.get(name)!r}" for name in differing)
                for of in (state["recipe"], recipe)
            )
            raise ValueError(f"the checkpoint belongs to another training, with {got}, expected {expected}")
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.rows, self.evaluations = state["step"], state["rows"], state["evaluations"]
        self._start_row()

    def as_log(self, machine: dict[str, Any]) -> dict[str, Any]:
        return {
            "recipe": self.recipe.as_json(),
            "steps": self.steps,
            "parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "processes": self.processes.world,
            "device": self.processes.device.type,
            "machine": machine,
            "rows": self.rows,
            "evaluations": self.evaluations,
        }


def save_atomically(state: dict[str, Any], file: Path) -> None:
    """Replaces the file in one step: a killed process leaves the old file or the new one, whole."""
    new = file.with_suffix(".new")
    with new.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name
    os.close(folder)


def class_weights(recipe: Recipe, source: Source) -> Tensor | None:
    """Median-frequency weights (Eq. 2) of all label maps at full size; None if the recipe has none."""
    if recipe.weights == "none":
        return None
    return median_frequency_weights(source.label_maps(), source.hierarchy)


def train(
    recipe: Recipe,
    root: Path,
    output: Path,
    processes: Processes,
    *,
    split: str,
    workers: int,
    interval: int | None,
    evaluate_every: int | None,
    console: Console,
) -> None:
    """Trains to the end of the recipe, from the checkpoint in ``output`` if there is one.

    Writes the checkpoint, the log and some predictions to ``output``.

    Args:
        root: the folder of the data set.
        split: the split for evaluation at the end and, if given, every ``evaluate_every`` epochs.
        workers: the number of processes that read images.
        interval: steps between checkpoints and rows of the log; None: an epoch.

    Raises:
        FileNotFoundError: a part of the data set is missing.
        ValueError: the checkpoint belongs to another recipe, or the batch does not fit images or processes.
        FloatingPointError: the loss is not finite.
    """
    if recipe.batch % processes.world:
        raise ValueError(f"batch is {recipe.batch}, expected a multiple of the {processes.world} processes")
    source, held_out = (DATA_SETS[recipe.data].open(root, name) for name in ("train", split))
    images = TrainingSet(source, recipe.seed, recipe.scale, recipe.crop, recipe.zoom)
    if recipe.batch > len(images):
        raise ValueError(f"batch is {recipe.batch}, more than the {len(images)} images")
    weight, steps_per_epoch = class_weights(recipe, source), len(images) // recipe.batch
    training = Training(recipe, source.hierarchy, weight, steps_per_epoch, processes)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint, machine = output / CHECKPOINT, describe_machine()
    if checkpoint.exists():
        training.load(torch.load(checkpoint, map_location=processes.device, weights_only=True))
        console.print(f"resuming at step {training.step} of {training.steps}")
        if processes.rank == 0:  # a process killed between the two files left an older log
            write_json(output / LOG, training.as_log(machine))
    steps = (training.step, training.steps)
    batches = Batches(len(images), recipe.batch, recipe.seed, *steps, processes.rank, processes.world)
    pin = processes.device.type == "cuda"
    loader = DataLoader(images, batch_sampler=batches, num_workers=workers, pin_memory=pin)
    interval = interval or steps_per_epoch
    evaluate_every = (evaluate_every or recipe.epochs) * steps_per_epoch
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=training.steps, completed=training.step)
        shown = 0.0
        for batch in loader:
            training.take_step(*batch)
            if time.monotonic() - shown > PROGRESS_SECONDS:
                progress.update(task, completed=training.step, description=training.describe_progress())
                shown = time.monotonic()
            evaluates = training.step == training.steps or training.step % evaluate_every == 0
            if not evaluates and training.step % interval:
                continue
            training.record()
            if evaluates:
                scores = evaluate(
                    training.network,
                    held_out,
                    recipe.scale,
                    processes,
                    bf16=recipe.bf16,
                    workers=workers,
                    keep=output / PREDICTIONS,
                )
                training.evaluations.append({"step": training.step, "split": split} | scores.as_json())
            if processes.rank == 0:
                save_atomically(training.state(), checkpoint)
                write_json(output / LOG, training.as_log(machine))
        progress.update(task, completed=training.step)
    last = training.evaluations[-1]
    console.print(f"{last['split']}: mean IoU {last['mean_iou']} %, by level {last['group_iou']}")
