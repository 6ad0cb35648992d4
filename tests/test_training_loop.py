"""The training loop: exact resume, clipping, accumulation, early stopping, skipped updates."""

from __future__ import annotations

import json
import math
import os
import signal

import pytest
import torch
from torch import nn

from recurra.cell import leaves
from recurra.errors import CheckpointError, ConfigError, TrainingError
from recurra.training.checkpoint import load
from recurra.training.config import TrainingConfig
from recurra.training.loop import Interrupted, Trainer
from recurra.training.optimise import bound_gradients, learning_rate
from recurra.training.progress import Silent
from recurra.training.run import Run
from toy import Notes, ToyTask, config, new_trainer


def tensors(folder):
    return load(folder / "checkpoints", "last").tensors


def metrics(folder):
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


def same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


class StopsAt(ToyTask):
    """Sends this process a signal in the middle of the given update."""

    def __init__(self, settings, update, number=signal.SIGINT):
        super().__init__(settings)
        self.update, self.number, self.calls = update, number, 0

    def loss(self, model, window, carry, rows):
        self.calls += 1
        if self.calls == self.update:
            os.kill(os.getpid(), self.number)
        return super().loss(model, window, carry, rows)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop_at", [1, 3, 5, 8, 13])
def test_a_run_that_was_interrupted_and_resumed_equals_one_that_was_not(tmp_path, stop_at, accumulate):
    settings = config(accumulate=accumulate)
    new_trainer(tmp_path / "whole", settings).fit()

    with pytest.raises(Interrupted) as caught:
        new_trainer(tmp_path / "parts", settings, StopsAt(settings, stop_at)).fit()
    assert caught.value.exit_code == 130
    assert "recurra resume" in str(caught.value)
    assert load(tmp_path / "parts" / "checkpoints").facts["position"]["step"] < 20

    run = Run.open(tmp_path / "parts")
    again = Trainer(ToyTask(settings), run, settings, new_trainer(tmp_path / "x", settings).world, Silent())
    again.restore(load(run.checkpoints, "last"))
    again.fit()
    same_bits(tensors(tmp_path / "whole"), tensors(tmp_path / "parts"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


@pytest.mark.parametrize("left_out", ["optimizer.", "carry."])
def test_the_comparison_notices_what_a_careless_checkpoint_would_forget(tmp_path, left_out):
    settings = config()
    new_trainer(tmp_path / "whole", settings).fit()
    with pytest.raises(Interrupted):
        new_trainer(tmp_path / "parts", settings, StopsAt(settings, 8)).fit()
    checkpoint = load(tmp_path / "parts" / "checkpoints")
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(left_out):
            tensor.zero_()
    again = new_trainer(tmp_path / "y", settings)
    again.run = Run.open(tmp_path / "parts")
    again.restore(checkpoint)
    again.fit()
    with pytest.raises(AssertionError):
        same_bits(tensors(tmp_path / "whole"), tensors(tmp_path / "parts"))


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        new_trainer(tmp_path / name, config(seed=seed, epochs=1)).fit()
    same_bits(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    with pytest.raises(AssertionError):
        same_bits(tensors(tmp_path / "a"), tensors(tmp_path / "c"))


def test_an_interrupt_in_an_evaluation_saves_and_the_evaluation_is_made_up_for(tmp_path):
    settings = config()
    new_trainer(tmp_path / "whole", settings).fit()

    class StopsInEvaluation(ToyTask):
        def evaluate(self, model):
            if self.evaluations == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().evaluate(model)

    with pytest.raises(Interrupted) as caught:
        new_trainer(tmp_path / "parts", settings, StopsInEvaluation(settings)).fit()
    assert caught.value.exit_code == 128 + signal.SIGTERM
    again = new_trainer(tmp_path / "z", settings)
    again.run = Run.open(tmp_path / "parts")
    again.restore(load(tmp_path / "parts" / "checkpoints"))
    again.fit()
    same_bits(tensors(tmp_path / "whole"), tensors(tmp_path / "parts"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_signal_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    new_trainer(tmp_path / "run", config(epochs=1)).fit()
    assert signal.getsignal(signal.SIGINT) is before


def nan_at(step, row):
    def poison(x):
        x = x.clone()
        x[step, row] = math.nan
        return x

    return poison


def test_a_bad_input_skips_exactly_that_update_and_says_where_it_began(tmp_path):
    settings = config(epochs=1)
    task, notes = ToyTask(settings), Notes()
    task.poison = {2: nan_at(4, 1)}
    trainer = new_trainer(tmp_path / "run", settings, task, notes)
    before_and_after = []
    skip = trainer._skip
    trainer._skip = lambda *arguments: (
        before_and_after.append([p.detach().clone() for p in task.model.parameters()]) or skip(*arguments)
    )
    position = trainer.fit()
    assert (position.step, position.skipped, position.skipped_in_a_row) == (5, 1, 0)
    [said] = [line for line in notes.said if "skipped" in line]
    assert said.startswith("update 3 skipped: the output of rnn.cell.cells.0.cell.cell (LSTM) at time step 4")
    assert [entry["step"] for entry in metrics(tmp_path / "run") if entry.get("skipped")] == [3]
    for parameter in task.model.parameters():
        assert torch.isfinite(parameter).all()

    # The same run without that window's update, by hand.
    plain = ToyTask(settings)
    by_hand = new_trainer(tmp_path / "hand", settings, plain)
    by_hand.began, by_hand.earlier = 0.0, 0.0
    plain.model.train()
    for window in range(5):
        if window == 2:
            kept = by_hand.carry
            plain.poison = task.poison
            list(by_hand._losses(plain.model, range(2, 3)))
            bad = ~torch.isfinite(by_hand.carry[0][0]).all(1)
            assert bad.tolist() == [False, True, False, False]
            fresh = plain.initial_carry()
            by_hand.carry = type(kept)(
                type(a)(*(torch.where(bad[:, None], f, n) for f, n in zip(b, a, strict=True)))
                for a, b in zip(by_hand.carry, fresh, strict=True)
            )
            plain.poison = {}
            by_hand.position.step += 1
            by_hand.position.skipped += 1
        else:
            by_hand._update()
    for one, other in zip(task.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_gradient_that_overflows_is_found_on_its_way_back(tmp_path):
    settings = config(epochs=1)
    task, notes = ToyTask(settings, regularised=False), Notes()

    class Explodes(torch.autograd.Function):
        @staticmethod
        def forward(context, y):
            return y.clone()

        @staticmethod
        def backward(context, gradient):
            gradient = gradient.clone()
            gradient[3, 0] = math.inf
            return gradient

    loss = task.loss

    def planted(model, window, carry, rows):
        if window != 1:
            return loss(model, window, carry, rows)
        x, target = task.window(window, rows)
        y, carry = task.model.rnn(x, carry)
        return nn.functional.mse_loss(task.model.readout(Explodes.apply(y)), target), target.numel(), carry

    task.loss = planted
    position = new_trainer(tmp_path / "run", settings, task, notes).fit()
    assert position.skipped == 1
    [said] = [line for line in notes.said if "skipped" in line]
    assert "the gradient at the output of rnn" in said
    assert "time step 3 is not finite" in said


def test_training_stops_after_too_many_skips_in_a_row_and_keeps_the_good_weights(tmp_path):
    settings = config(skip_limit=3)
    task = ToyTask(settings)
    task.poison = {k: nan_at(0, 0) for k in range(1, 5)}
    trainer = new_trainer(tmp_path / "run", settings, task)
    with pytest.raises(TrainingError, match=r"3 updates in a row .*time step 0.*Lower the learning rate"):
        trainer.fit()
    saved = load(tmp_path / "run" / "checkpoints", "last")
    assert saved.facts["position"]["step"] == 4
    assert all(torch.isfinite(t).all() for t in saved.tensors.values())


def test_an_infinite_loss_with_finite_gradients_is_skipped_too(tmp_path):
    settings = config(epochs=1)
    task = ToyTask(settings)
    loss = task.loss

    def infinite(model, window, carry, rows):
        value, count, carry = loss(model, window, carry, rows)
        return value + (math.inf if window == 1 else 0.0), count, carry

    task.loss = infinite
    assert new_trainer(tmp_path / "run", settings, task).fit().skipped == 1


def test_patience_ends_training_at_the_first_hopeless_evaluation(tmp_path):
    settings = config(epochs=50, patience=2)
    task = ToyTask(settings)
    answers = iter([5.0, 3.0, 4.0, 2.5, 2.5, 2.6, 0.1])
    task.evaluate = lambda model: next(answers)
    position = new_trainer(tmp_path / "run", settings, task).fit()
    assert (position.best, position.best_step, position.step) == (2.5, 20, 30)
    assert load(tmp_path / "run" / "checkpoints", "best").facts["step"] == 20


def test_accumulated_windows_make_the_gradient_of_their_mean(tmp_path):
    settings = config(accumulate=2, epochs=1)
    task = ToyTask(settings, regularised=False)
    trainer = new_trainer(tmp_path / "run", settings, task)
    for _, (loss, _) in zip(range(2), trainer._losses(task.model, range(2)), strict=True):
        loss.backward()
    carry, means = task.initial_carry(), []
    model = ToyTask(settings, regularised=False).model
    for window in range(2):
        loss, _, carry = task.loss(model, window, carry, slice(None))
        carry = tuple(type(part)(*(leaf.detach() for leaf in part)) for part in carry)
        means.append(loss)
    (sum(means) / 2).backward()
    for one, other in zip(task.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert new_trainer(tmp_path / "all", settings).fit().step == 3  # 2 + 2 + 1 windows


@pytest.mark.parametrize("settings", [config(clip_norm=0.5), config(clip_norm=None, clip_value=0.01), config()])
def test_clipping_agrees_with_torch(settings):
    one, other = ToyTask(settings).model, ToyTask(settings).model
    for model in (one, other):
        x = torch.linspace(-1, 1, 6 * 4 * 3).view(6, 4, 3)
        torch.manual_seed(0)
        (model(x, None)[0] ** 2).sum().mul(30).backward()
    norm = bound_gradients(one, settings)
    expected = torch.nn.utils.get_total_norm([p.grad for p in other.parameters()])
    assert torch.equal(norm, expected)
    if settings.clip_value:
        torch.nn.utils.clip_grad_value_(other.parameters(), settings.clip_value)
    if settings.clip_norm:
        torch.nn.utils.clip_grad_norm_(other.parameters(), settings.clip_norm)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-8)


def test_the_learning_rate_rises_and_falls_as_stated():
    c = TrainingConfig(learning_rate=2.0, warmup=4, final_rate=0.1, schedule="linear")
    assert [learning_rate(u, 14, c) for u in (0, 1, 3, 4, 9)] == pytest.approx([0.5, 1.0, 2.0, 2.0, 1.1])
    assert learning_rate(14, 14, c) == pytest.approx(0.2)
    assert learning_rate(9, 14, TrainingConfig(learning_rate=2.0, warmup=4, final_rate=0.1)) == pytest.approx(1.1)
    assert learning_rate(999, 14, TrainingConfig(learning_rate=2.0, schedule="constant")) == 2.0


def test_a_checkpoint_of_another_batch_size_or_model_is_refused(tmp_path):
    new_trainer(tmp_path / "run", config(epochs=1)).fit()
    checkpoint = load(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="was the batch size changed"):
        new_trainer(tmp_path / "b", config(batch_size=6)).restore(checkpoint)
    task = ToyTask(config())
    task.identity = lambda: {"toy": 2}
    with pytest.raises(CheckpointError, match="a file of the run was exchanged"):
        new_trainer(tmp_path / "c", config(), task).restore(checkpoint)


def test_bfloat16_trains_and_keeps_weights_and_carried_state_in_float32(tmp_path):
    trainer = new_trainer(tmp_path / "run", config(precision="bfloat16", epochs=8))
    trainer.fit()
    assert {leaf.dtype for leaf in leaves(trainer.carry)} == {torch.float32}
    losses = [e["loss"] for e in metrics(tmp_path / "run") if "loss" in e]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_folder_in_use_is_not_trained_twice_nor_overwritten(tmp_path):
    trainer = new_trainer(tmp_path / "run", config(epochs=1))
    with (
        trainer.run.locked(),
        pytest.raises(CheckpointError, match="another process is training"),
        Run.open(tmp_path / "run").locked(),
    ):
        pass
    with pytest.raises(ConfigError, match="is a run: go on with it by"):
        Run.create(tmp_path / "run", "toy")
    with pytest.raises(CheckpointError, match="does not exist"):
        Run.open(tmp_path / "nowhere")


def test_tensorboard_files_hold_the_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    new_trainer(tmp_path / "run", config(epochs=1, tensorboard=True)).fit()
    written = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    losses = [entry["loss"] for entry in metrics(tmp_path / "run") if "loss" in entry]
    assert [point.value for point in written.Scalars("loss")] == pytest.approx(losses)


def test_the_loss_curve_is_drawn_and_is_well_formed(tmp_path):
    from xml.etree import ElementTree

    new_trainer(tmp_path / "run", config()).fit()
    picture = (tmp_path / "run" / "loss.svg").read_text()
    assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert "squared error" in picture
