"""The training loop: windows in, updates out, and nothing lost on the way.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn

from recurra.cell import State, detach, leaves, map_state, where_rows
from recurra.errors import CheckpointError, RecurraError, TrainingError
from recurra.training.checkpoint import Checkpoint, load_into, save
from recurra.training.config import TrainingConfig
from recurra.training.curve import draw_curve
from recurra.training.distributed import World
from recurra.training.incident import find_incident
from recurra.training.optimise import bound_gradients, learning_rate, make_optimizer
from recurra.training.progress import Progress, Rate
from recurra.training.run import Run
from recurra.training.task import Task


class Interrupted(RecurraError):
    """Training was asked to stop, and has saved everything."""

    def __init__(self, run: Run, signal_number: int) -> None:
        super().__init__(f"stopped and saved; go on with: recurra resume {run.path}")
        self.exit_code = 128 + signal_number


@dataclass
class Position:
    """Where training stands. Everything else about the data follows from ``step``."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seen: int = 0
    best: float | None = None
    best_step: int = 0
    evaluated: int = 0
    waited: int = 0
    seconds: float = 0.0


class Trainer:
    """One model, one task, one run. ``fit`` trains from where it stands to the end."""

    def __init__(self, task: Task, run: Run, config: TrainingConfig, world: World, progress: Progress) -> None:
        self.task, self.run, self.config, self.world, self.progress = task, run, config, world, progress
        self.rows = world.rows(config.batch_size)
        self.model = world.wrap(task.model)
        self.optimizer = make_optimizer(task.model, config)
        self.position = Position()
        self.carry: State = self._my_rows(task.initial_carry())
        self.updates_per_epoch = -(-task.windows // config.accumulate)
        self.total = config.epochs * self.updates_per_epoch
        if config.updates is not None:
            self.total = min(self.total, config.updates)
        self.evaluate_every = config.evaluate_every or self.updates_per_epoch
        self.rate = Rate()
        self.interrupts = Interrupts()
        self.tensorboard = _tensorboard(run) if config.tensorboard and world.leads else None

    def fit(self) -> Position:
        """Train to the end, or until patience runs out. Raises Interrupted after Ctrl-C, TrainingError when lost."""
        self.task.model.train()
        self.progress.begin(self.total, self.position.step)
        self.began = self.saved = self.drawn = time.monotonic()
        self.earlier = self.position.seconds
        with self.interrupts:
            try:
                while True:
                    self._evaluate_if_due()
                    if self._finished():
                        break
                    self._update()
                    late = time.monotonic() - self.saved > 60 * self.config.save_minutes
                    stop, late = self.world.any(self.interrupts.received is not None, late and self.world.leads)
                    if stop:
                        raise KeyboardInterrupt
                    if late:
                        self._save("last")
            except KeyboardInterrupt:
                self._save("last", draw=True)
                raise Interrupted(self.run, self.interrupts.received or signal.SIGINT) from None
            finally:
                self.progress.end()
                if self.tensorboard is not None:
                    self.tensorboard.close()
        self._save("last", draw=True)
        if self.position.best is None:
            raise TrainingError(
                f"training lost its way: no evaluation in {self.position.step} updates gave a finite loss. "
                "Lower the learning rate or clip_norm, or raise warmup"
            )
        return self.position

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up exactly where the checkpoint was made. Raises CheckpointError where it does not fit."""
        tensors = checkpoint.tensors
        if checkpoint.facts.get("task") != self.task.identity():
            raise CheckpointError(
                f"the checkpoint was made for {checkpoint.facts.get('task')}, the run's files are "
                f"{self.task.identity()}: a file of the run was exchanged"
            )
        load_into(self.task.model, _part(tensors, "model."))
        names = {parameter: name for name, parameter in self.task.model.named_parameters()}
        moments = _part(tensors, "optimizer.")
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                own = _part(moments, names[parameter] + "|")
                if own:
                    self.optimizer.state[parameter] = {key: value.clone() for key, value in own.items()}
        whole = self.task.initial_carry()
        stored = []
        for k, like in enumerate(leaves(whole)):
            leaf = tensors.get(f"carry.{k}")
            if leaf is None or leaf.shape != like.shape or leaf.dtype != like.dtype:
                found = "none" if leaf is None else f"{tuple(leaf.shape)} {leaf.dtype}"
                raise CheckpointError(
                    f"the checkpoint's carried state {k} does not fit: expected {tuple(like.shape)} {like.dtype}, "
                    f"got {found}; was the batch size changed?"
                )
            stored.append(leaf)
        rest = iter(stored)
        self.carry = self._my_rows(map_state(lambda _: next(rest), whole))
        try:
            self.position = Position(**checkpoint.facts["position"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"the checkpoint does not say where training stood: {error}") from error
        if self.world.leads:
            self.run.forget_after(self.position.step)

    def _finished(self) -> bool:
        out_of_patience = self.config.patience is not None and self.position.waited >= self.config.patience
        return self.position.step >= self.total or out_of_patience

    def _update(self) -> None:
        """One update: windows forward and backward, clip, step; or skip it where a number is not finite."""
        began, position = time.monotonic(), self.position
        step_in_epoch = position.step % self.updates_per_epoch
        first = step_in_epoch * self.config.accumulate
        windows = range(first, min(first + self.config.accumulate, self.task.windows))
        if step_in_epoch == 0:
            self.carry = self._my_rows(self.task.initial_carry())
        before = self.carry
        self.optimizer.zero_grad()
        total, seen = 0.0, 0
        for loss, count in self._losses(self.model, windows):
            loss.backward()
            total, seen = total + float(loss.detach()), seen + count
        norm = float(bound_gradients(self.task.model, self.config))
        total = self.world.mean(total)
        entry: dict[str, Any] = {"step": position.step + 1, "epoch": position.step // self.updates_per_epoch + 1}
        finite = math.isfinite(norm) and math.isfinite(total)
        if finite:
            rate = learning_rate(position.step - position.skipped, self.total, self.config)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            position.skipped_in_a_row = 0
            entry |= {"loss": total, "gradient_norm": norm, "learning_rate": rate}
        else:
            entry |= {"skipped": True, "incident": self._skip(before, windows)}
        position.step += 1
        position.seen += seen * self.world.size
        position.seconds = self.earlier + time.monotonic() - self.began
        self._record(entry)
        self.rate.add(seen * self.world.size, time.monotonic() - began)
        if finite:
            name, figure = next(iter(self.task.figures(total).items()))
            shown = {"loss": f"{total:.3f}", name.replace(" per ", "/"): f"{figure:.3f}", "norm": f"{norm:.2f}"}
            self.progress.update(position.step, shown | {f"{self.task.unit}/s": f"{self.rate.value:,.0f}"})
        if position.skipped_in_a_row >= self.config.skip_limit:
            self._save("last", draw=True)
            raise TrainingError(
                f"{position.skipped_in_a_row} updates in a row had a gradient that is not finite; last: "
                f"{entry.get('incident')}. The weights are those before the first of them, saved in {self.run.path}. "
                "Lower the learning rate or clip_norm, or look for values in the data that are not finite"
            )

    def _losses(self, model: nn.Module, windows: range) -> Iterator[tuple[Tensor, int]]:
        """Each window's share of the loss, the state carried through. The same call gives the same randomness."""
        seed = f"{self.config.seed} {self.position.step} {self.world.rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.blake2b(seed, digest_size=7).digest(), "big"))
        for window in windows:
            with self._synchronised(model, window == windows[-1]):
                with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bfloat16"):
                    loss, count, carry = self.task.loss(model, window, self.carry, self.rows)
                self.carry = detach(carry)
                yield loss / len(windows), count

    def _skip(self, before: State, windows: range) -> str:
        """Leave weights and optimiser as they are, and say where it began. Rows whose state went bad start afresh."""
        after, self.carry = self.carry, before
        reason = find_incident(self.task.model, lambda: (loss for loss, _ in self._losses(self.task.model, windows)))
        good = [torch.isfinite(leaf.flatten(1)).all(1) for leaf in leaves(after)]
        fresh = self._my_rows(self.task.initial_carry())
        self.carry = where_rows(torch.stack(good).all(0), after, fresh) if good else after
        self.position.skipped += 1
        self.position.skipped_in_a_row += 1
        self.progress.say(f"update {self.position.step + 1} skipped: {reason}")
        return reason

    def _evaluate_if_due(self) -> None:
        position = self.position
        due = position.step % self.evaluate_every == 0 or position.step >= self.total
        if not due or position.evaluated == position.step:
            return
        with self.interrupts.at_once() if self.world.size == 1 else nullcontext():
            loss = self.task.evaluate(self.task.model)
        self.task.model.train()
        position.evaluated = position.step
        best = math.isfinite(loss) and (position.best is None or loss < position.best)
        if best:
            position.best, position.best_step, position.waited = loss, position.step, 0
        else:
            position.waited += 1
        self._record({"step": position.step, "validation_loss": loss, "best": best})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in self.task.figures(loss).items())
        note = "  best so far" if best else f"  best was {position.best:.4f}" if position.best else ""
        self.progress.say(f"update {position.step}: validation loss {loss:.4f}  {shown}{note}")
        self._save(*(("last", "best") if best else ("last",)))

    def _record(self, entry: dict[str, Any]) -> None:
        if not self.world.leads:
            return
        entry["seconds"] = round(self.position.seconds, 3)
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        with open(self.run.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(clean) + "\n")
        if self.tensorboard is not None:
            for name in ("loss", "gradient_norm", "learning_rate", "validation_loss"):
                if clean.get(name) is not None:
                    self.tensorboard.add_scalar(name, clean[name], entry["step"])

    def _save(self, *names: str, draw: bool = False) -> None:
        carry = self.world.gather(self.carry)
        self.saved = time.monotonic()
        if not self.world.leads:
            return
        self.position.seconds = self.earlier + self.saved - self.began
        tensors = {f"model.{name}": tensor for name, tensor in self.task.model.state_dict().items()}
        for name, parameter in self.task.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}|{key}"] = value
        tensors |= {f"carry.{k}": leaf for k, leaf in enumerate(leaves(carry))}
        facts = {
            "step": self.position.step,
            "position": asdict(self.position),
            "task": self.task.identity(),
        }
        save(self.run.checkpoints, names, tensors, facts)
        if draw or self.saved - self.drawn > 30:
            name = next(iter(self.task.figures(1.0)))
            draw_curve(self.run, name, lambda loss: self.task.figures(loss)[name])
            self.drawn = time.monotonic()

    def _my_rows(self, carry: State) -> State:
        return map_state(lambda leaf: leaf[self.rows], carry)

    def _synchronised(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Gradients are averaged over the ranks once, with the last window's."""
        if last or not isinstance(model, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return model.no_sync()


class Interrupts:
    """SIGINT and SIGTERM as a note to be read between updates; at once where nothing can be lost."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.immediate = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread alone; in another one, training is simply not interrupted.
        if threading.current_thread() is threading.main_thread():
            self.before = {each: signal.signal(each, self._note) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """What runs inside changes nothing and may be broken off anywhere."""
        self.immediate = True
        try:
            if self.received is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self.immediate = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received is not None, number
        if self.immediate or again:
            raise KeyboardInterrupt


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _tensorboard(run: Run) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        from recurra.errors import MissingExtraError

        raise MissingExtraError("tensorboard", "tracking", "writing TensorBoard files") from error
    return SummaryWriter(str(run.path / "tensorboard"))
