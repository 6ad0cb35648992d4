"""The traced paths as a module among others: state_dict, copies, parametrisations, DDP, hooks, interrupts.

Legend: T time, B batch, I input, H hidden, O output, D any feature.
"""

from __future__ import annotations

import copy
import io
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import recurra
from around import B, I, T, close, make
from recurra import Recurrent
from recurra.cell import leaves

# PyTorch's own modules still use what PyTorch has given up.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture
def x():
    return torch.randn(T, B, I, dtype=torch.float64)


def test_state_dict_is_the_same_on_every_path_and_strict():
    rnn = make("compiled")
    rnn(torch.randn(T, B, I, dtype=torch.float64))
    names = ["cell.weight_ih", "cell.weight_hh", "cell.bias"]
    assert list(rnn.state_dict()) == list(make("loop").state_dict()) == names
    make("loop").load_state_dict(rnn.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        make().load_state_dict(rnn.state_dict() | {"other": torch.ones(1)})


def test_new_weights_count_at_once(x):
    rnn, other = make("compiled"), make("loop")
    rnn(x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    rnn.load_state_dict(other.state_dict())
    close(rnn(x)[0], other(x)[0])


def test_a_whole_module_is_saved_and_loaded_in_another_process(tmp_path, x):
    rnn = make("compiled")
    y = rnn(x)[0]
    close(copy.deepcopy(rnn)(x)[0], y)
    torch.save(rnn, tmp_path / "rnn.pt")
    torch.save((x, y.detach()), tmp_path / "data.pt")
    code = (
        "import torch\n"
        "rnn = torch.load('rnn.pt', weights_only=False)\n"
        "x, y = torch.load('data.pt')\n"
        "assert (rnn(x)[0] - y).abs().max() < 1e-12\n"
        "print(rnn.explain().ran)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "compiled\n", "")
    assert (tmp_path / "rnn.pt").stat().st_size < 10_000


def test_parametrized_weights(x):
    results = []
    for backend in ("compiled", "loop"):
        rnn = make(backend)
        parametrizations.weight_norm(rnn.cell, "weight_hh")
        parametrizations.orthogonal(rnn.cell, "weight_ih", orthogonal_map="cayley")
        y = rnn(x)[0]
        y.sin().sum().backward()
        results.append([y, *(parameter.grad for parameter in rnn.parameters())])
    close(*results)
    assert len(results[0]) == 5


def test_distributed_data_parallel_around_it(tmp_path, x):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        rnn = make("compiled")
        nn.parallel.DistributedDataParallel(rnn)(x)[0].sin().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    loop = make("loop")
    loop(x)[0].sin().sum().backward()
    close([p.grad for p in rnn.parameters()], [p.grad for p in loop.parameters()])


def test_hooks_on_the_cell_see_every_step(x):
    rnn, seen = make(), []
    handle = rnn.cell.register_forward_hook(lambda *_: seen.append(1))
    rnn(x)
    assert (len(seen), rnn.explain().ran) == (T, "loop")
    handle.remove()
    rnn(x)
    assert (len(seen), rnn.explain().ran) == (T, "compiled")


def test_torch_save_of_results_keeps_no_more_than_they_are(x):
    y, state = make("compiled")(x)
    for result in (y, *leaves(state)):
        file = io.BytesIO()
        torch.save(result.detach(), file)
        assert file.tell() < result.numel() * 8 + 2_000


def test_an_interrupt_leaves_no_broken_state():
    """Ctrl-C during a long native call is seen when the call returns; the next call is as good as any."""
    code = (
        "import os, signal, threading, torch\n"
        "from recurra import Recurrent, cells\n"
        # A shell's background jobs ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "rnn, x = Recurrent(cells.LSTM(64, 128), backend='compiled'), torch.randn(2000, 16, 64)\n"
        "expected = rnn(x)[0]\n"
        "for delay in (0.001, 0.01, 0.02, 0.05):\n"
        "    timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))\n"
        "    try:\n"
        "        timer.start()\n"
        "        while True: rnn(x)[0].sum().backward()\n"
        "    except KeyboardInterrupt:\n"
        "        pass\n"
        "    assert (rnn(x)[0] - expected).abs().max() == 0\n"
        "print('fine')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "fine\n"), run.stderr
    assert signal.getsignal(signal.SIGINT)


def test_double_backward_goes_through_the_loop(x):
    def second(rnn):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(rnn(leaf)[0].sin().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.sin().sum(), leaf)[0]

    close(second(make("compiled")), second(make("loop")))


def test_the_package_has_registered_its_operators():
    assert recurra.Recurrent is Recurrent
    make()
    assert torch.ops.recurra.over_time.default._schema.name == "recurra::over_time"
