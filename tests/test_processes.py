"""Real processes: interrupted, killed, out of disk, several at once."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from recurra.training.checkpoint import load

TEXT = "She sells sea shells by the sea shore; the shells she sells are sea shells, I am sure.\n" * 60
OPTIONS = """
    --hidden-size 12 --embedding-size 6 --batch-size 4 --window 8 --validation 0.1 --test 0.1
    --threads 1 --evaluate-every 50
"""
PLAIN = OPTIONS.split()
SMALL = [*PLAIN, "--dropout", "0.2", "--zoneout", "0.1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "shells.txt"
    file.write_text(TEXT)
    return file


STARTED = []


@pytest.fixture(autouse=True)
def _nothing_left_running():
    yield
    for process in STARTED:
        if process.poll() is None:
            process.kill()
        process.communicate()
    STARTED.clear()


def start(*arguments, **options):
    command = [sys.executable, "-m", "recurra", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, **options
    )
    STARTED.append(process)
    return process


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def wait_for(condition, process, seconds=200):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        time.sleep(0.01)
    raise AssertionError("waited in vain")


def lines_of(folder):
    metrics = Path(folder) / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def same_weights(one, other):
    a, b = load(one / "checkpoints").tensors, load(other / "checkpoints").tensors
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_interrupted_then_killed_then_resumed_equals_uninterrupted(tmp_path, text):
    whole = start("train", "language", text, "--folder", tmp_path / "whole", "--epochs", "2", *SMALL)
    parts = start("train", "language", text, "--folder", tmp_path / "parts", "--epochs", "2", *SMALL)
    wait_for(lambda: lines_of(tmp_path / "parts") > 20, parts)
    parts.send_signal(signal.SIGINT)
    code, _, err = finish(parts)
    assert code == 130, err
    assert "stopped and saved; go on with: recurra resume" in err
    assert "Traceback" not in err
    done = load(tmp_path / "parts" / "checkpoints").facts["step"]
    assert done > 0

    again = start("resume", tmp_path / "parts")
    wait_for(lambda: lines_of(tmp_path / "parts") > done + 30, again)
    again.kill()
    finish(again)
    assert load(tmp_path / "parts" / "checkpoints").facts["step"] < 280

    code, _, err = finish(start("resume", tmp_path / "parts"))
    assert code == 0, err
    assert finish(whole)[0] == 0
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))


def test_a_full_disk_is_said_and_loses_nothing(tmp_path, text):
    folder = tmp_path / "run"
    code, _, err = finish(start("train", "language", text, "--folder", folder, "--updates", "60", *SMALL))
    assert code == 0, err
    before = load(folder / "checkpoints").facts["step"]
    config = folder / "config.toml"
    config.write_text(re.sub(r"updates = 60", "updates = 200", config.read_text()))
    code, _, err = finish(start("resume", folder, preexec_fn=limit_files))
    assert code == 1
    assert "limit on the size of a file" in err or "disk" in err
    assert "Traceback" not in err
    assert load(folder / "checkpoints").facts["step"] == before
    code, _, err = finish(start("resume", folder))
    assert code == 0, err
    assert load(folder / "checkpoints").facts["step"] == 200


def test_a_reader_that_goes_away_ends_the_writing_quietly(tmp_path, text):
    folder = tmp_path / "run"
    assert finish(start("train", "language", text, "--folder", folder, "--updates", "5", *SMALL))[0] == 0
    writer = start("sample", folder, "--length", "1000000")
    assert writer.stdout.read(10)
    writer.stdout.close()
    writer.stdout = None
    _, err = writer.communicate(timeout=200)
    assert "Traceback" not in err
    assert "Exception ignored" not in err


def test_text_comes_through_standard_input(tmp_path):
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "recurra",
            "train",
            "language",
            "-",
            "--folder",
            tmp_path / "run",
            "--updates",
            "3",
            *SMALL,
        ],
        input=TEXT,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "run" / "loss.svg").exists()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_processes_train_the_model_that_one_would(tmp_path, text, accumulate):
    arguments = [*PLAIN, "--accumulate", str(accumulate), "--updates", "40"]
    one = start("train", "language", text, "--folder", tmp_path / "one", *arguments)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = subprocess.run(
        [*torchrun, "-m", "recurra", "train", "language", text, "--folder", tmp_path / "two", *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert two.returncode == 0, two.stderr
    assert finish(one)[0] == 0
    a, b = load(tmp_path / "one" / "checkpoints"), load(tmp_path / "two" / "checkpoints")
    assert a.facts["position"]["seen"] == b.facts["position"]["seen"]
    for name in a.tensors:
        torch.testing.assert_close(a.tensors[name], b.tensors[name], rtol=1e-4, atol=1e-5)
    assert two.stderr.count("Next:") == 1


def test_processes_that_the_batch_does_not_divide_among_are_refused(tmp_path, text):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = subprocess.run(
        [*torchrun, "-m", "recurra", "train", "language", text, "--folder", tmp_path / "run", "--batch-size", "3"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert two.returncode != 0
    assert "batch_size=3 does not divide among 2 processes" in two.stderr
    assert not (tmp_path / "run").exists()


ENDS = """
import pathlib, sys, torch
from recurra.training.distributed import world

def threads():
    return sorted({task.joinpath("comm").read_text().strip() for task in pathlib.Path("/proc/self/task").iterdir()})

def train(everyone):
    model = everyone.wrap(torch.nn.Linear(3, 2))
    model.list = [model]  # a cycle
    model(torch.ones(4, 3)).sum().backward()
    return sys.argv[1] == "fails" and 1 / 0

try:
    with world() as everyone:
        object.__setattr__(everyone, "size", 2)  # a model is wrapped for more than one
        train(everyone)
    print(threads())
except ZeroDivisionError:
    print(threads())  # while the traceback is there
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", ["succeeds", "fails"])
def test_no_thread_of_the_group_is_left_to_meet_the_end_of_python(how):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = subprocess.run(
        [sys.executable, "-c", ENDS, how], capture_output=True, text=True, env=ENVIRONMENT | alone, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "python" in done.stdout
    assert "gloo" not in done.stdout
