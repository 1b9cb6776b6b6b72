"""Training: its state and steps, and the run from the start or from the last checkpoint to the end."""

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

from benchmarks.common import describe_machine, write_json
from ial_cuda import Hierarchy, median_frequency_weights

from .data import SOURCES, Batches, Source, TrainingSet, as_input
from .losses import make_loss, total_weight
from .networks import NETWORKS
from .processes import Processes
from .recipe import Recipe
from .scores import Scores, evaluate, update_at_logits

CHECKPOINT, LOG, PREDICTIONS = "checkpoint.pt", "log.json", "predictions"
MOMENTUM = 0.9
POLY_POWER = 0.9  # the learning rate falls as (1 - step / steps) ** POLY_POWER
TOLD_EVERY_S = 0.5  # the bar; more often would be a synchronisation with the GPU in each step


class Training:
    """A network, and all that its training goes on from.

    Attributes:
        step: how many have been taken, of ``steps``.
        network: without what `Processes.prepare` puts around it.
        loss: of logits and labels, `losses.Loss`.
        rows: what was logged, a row for each call of `record`.
        evaluations: the scores of each evaluation.
    """

    def __init__(
        self,
        recipe: Recipe,
        hierarchy: Hierarchy,
        ignore_index: int,
        weight: Tensor | None,
        steps_per_epoch: int,
        processes: Processes,
    ) -> None:
        self.recipe, self.processes, self.ignore_index = recipe, processes, ignore_index
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

        options: dict[str, Any] = {
            "lr": recipe.learning_rate,
            "weight_decay": recipe.weight_decay,
            "fused": True,
        }
        if recipe.optimizer == "adam":
            self.optimizer = torch.optim.Adam(self.network.parameters(), **options)
        else:
            self.optimizer = torch.optim.SGD(self.network.parameters(), momentum=MOMENTUM, **options)
        self.schedule = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, self.steps, POLY_POWER)

        self.weight = None if weight is None else weight.to(processes.device)
        # The mean is over the pixels of all processes. Of a share of them each has the sum; see `_loss_of`.
        reduction = "mean" if processes.world == 1 else "sum"
        self.loss = make_loss(recipe, hierarchy, ignore_index, self.weight, reduction)
        self.scores = Scores(hierarchy, ignore_index).to(processes.device)
        self._forget()

    def _forget(self) -> None:
        """Starts a new row."""
        self.scores.reset()
        self._loss_sum, self._f_sum, self._row_start = 0.0, 0.0, self.step
        self._since = time.monotonic()

    def take_step(self, images: Tensor, labels: Tensor) -> None:
        """One step on this process' share of a batch, images (N, h, w, 3) and labels (N, h, w), uint8."""
        # Dropout, too, depends on seed and step alone: a checkpoint needs no state of generators.
        seed = np.random.SeedSequence((self.recipe.seed, self.step)).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))
        labels = labels.to(self.processes.device, non_blocking=True)
        self.network.train()
        self.optimizer.zero_grad()
        logits = self.logits(images)
        loss, f = self._loss_of(logits, labels)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self._loss_sum += loss.detach()
        if f is not None:
            self._f_sum += f.mean(0)
        update_at_logits(self.scores, logits.detach(), labels)

    def logits(self, images: Tensor) -> Tensor:
        """Of images (N, h, w, 3), uint8."""
        images = as_input(images, self.processes.device)
        if not self.recipe.channels_last:
            images = images.contiguous()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.recipe.bf16):
            return self._call(images)

    def _loss_of(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        loss, f = self.loss(logits, labels)
        if self.processes.world > 1:
            total = self.processes.add(total_weight(labels, self.weight, self.ignore_index))
            loss = loss * (self.processes.world / total)  # DistributedDataParallel takes the mean
        return loss, f

    def tell(self) -> str:
        """Loss, mean IoU and factors since the last row, of this process' share."""
        steps = self.step - self._row_start
        told = f"loss {self._loss_sum.item() / steps:.4f}, IoU {100 * self.scores.mean():.1f} %"
        if isinstance(self._f_sum, Tensor):
            told += ", f " + " ".join(f"{f / steps:.3f}" for f in self._f_sum.tolist())
        return told

    def record(self) -> None:
        """Appends a row: means over all steps since the last one.

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        steps = (self.step - self._row_start) * self.processes.world
        loss = self.processes.add(self._loss_sum).item() / steps
        f = self._f_sum
        f = (self.processes.add(f) / steps).tolist() if isinstance(f, Tensor) else None
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} in the steps {self._row_start} to {self.step - 1}")
        self.rows.append(
            {
                "step": self.step,
                "epoch": self.step / self.steps_per_epoch,
                "learning_rate": self.schedule.get_last_lr()[0],
                "loss": loss,
                "f": f,
                "train_iou": 100 * self.scores.gather(self.processes).mean(),
                "seconds": round(time.monotonic() - self._since, 3),
            }
        )
        self._forget()

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
        """Goes on from a state.

        Raises:
            ValueError: it is another recipe's.
        """
        recipe = self.recipe.as_json()
        other = [name for name, value in recipe.items() if state["recipe"].get(name) != value]
        if other:
            raise ValueError(
                "the checkpoint is that of another training, with "
                + ", ".join(f"{name}={state['recipe'].get(name)!r}" for name in other)
                + ", expected "
                + ", ".join(f"{name}={recipe[name]!r}" for name in other)
            )
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.rows, self.evaluations = state["step"], state["rows"], state["evaluations"]
        self._forget()


def save_atomically(state: dict[str, Any], file: Path) -> None:
    """So that who is killed at any moment leaves the old file or the new one, whole and on disk."""
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
    """Those of Eq. 2, counted from all label maps at full size; None where the recipe has none."""
    if recipe.weights == "none":
        return None
    classes, void = source.hierarchy.num_classes, source.ignore_index
    return median_frequency_weights(source.label_maps(), classes, ignore_index=void)


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

    Writes to ``output``, each time at once: the checkpoint, the log, and some predictions.

    Args:
        root: the data set's folder.
        split: on which the network is evaluated, at the end, and every ``evaluate_every`` epochs if given.
        workers: processes that read images.
        interval: steps from one checkpoint and row of the log to the next; None: an epoch's.

    Raises:
        FileNotFoundError: part of the data set is not there.
        ValueError: the checkpoint is another recipe's, or the batch does not suit images or processes.
        FloatingPointError: the loss is no longer finite.
    """
    if recipe.batch % processes.world:
        raise ValueError(f"batch is {recipe.batch}, expected a multiple of the {processes.world} processes")
    source, held_out = (SOURCES[recipe.data](root, name) for name in ("train", split))
    images = TrainingSet(source, recipe.seed, recipe.scale, recipe.crop, recipe.zoom)
    if recipe.batch > len(images):
        raise ValueError(f"batch is {recipe.batch}, more than the {len(images)} images")
    order = (len(images), recipe.batch, recipe.seed)
    training = Training(
        recipe,
        source.hierarchy,
        source.ignore_index,
        class_weights(recipe, source),
        len(images) // recipe.batch,
        processes,
    )
    output.mkdir(parents=True, exist_ok=True)
    checkpoint, machine = output / CHECKPOINT, describe_machine()
    if checkpoint.exists():
        training.load(torch.load(checkpoint, map_location=processes.device, weights_only=True))
        console.print(f"going on from step {training.step} of {training.steps}")
        if processes.rank == 0:  # who was killed between the two has an older log
            write_json(output / LOG, make_log(training, machine))
    batches = Batches(*order, training.step, training.steps, processes.rank, processes.world)
    loader = DataLoader(
        images, batch_sampler=batches, num_workers=workers, pin_memory=processes.device.type == "cuda"
    )
    interval = interval or training.steps_per_epoch
    evaluation = evaluate_every and evaluate_every * training.steps_per_epoch
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=training.steps, completed=training.step)
        told = 0.0
        for batch in loader:
            training.take_step(*batch)
            if time.monotonic() - told > TOLD_EVERY_S:
                progress.update(task, completed=training.step, description=training.tell())
                told = time.monotonic()
            ends = training.step == training.steps
            to_evaluate = ends or (evaluation and training.step % evaluation == 0)
            if not to_evaluate and training.step % interval:
                continue
            training.record()
            if to_evaluate:
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
                write_json(output / LOG, make_log(training, machine))
        progress.update(task, completed=training.step)
    last = training.evaluations[-1]
    console.print(f"{last['split']}: mean IoU {last['mean_iou']} %, of each level {last['group_iou']}")


def make_log(training: Training, machine: dict[str, Any]) -> dict[str, Any]:
    return {
        "recipe": training.recipe.as_json(),
        "steps": training.steps,
        "parameters": sum(parameter.numel() for parameter in training.network.parameters()),
        "processes": training.processes.world,
        "device": training.processes.device.type,
        "machine": machine,
        "rows": training.rows,
        "evaluations": training.evaluations,
    }
