"""Checkpoints: what goes in comes out, and nothing else does."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from checkpoints import same, small
from recurra import files
from recurra.errors import CheckpointError
from recurra.training import checkpoint, tensor_file
from recurra.training.checkpoint import load, load_into, save

# What goes in comes out


@st.composite
def _tensor(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(sorted(tensor_file.DTYPES.values(), key=str)))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    count = math.prod(shape) * dtype.itemsize
    raw = draw(st.binary(min_size=count, max_size=count))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    return torch.tensor(list(raw), dtype=torch.uint8).view(dtype).reshape(shape)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=8), _tensor(), max_size=5))
def test_every_dtype_and_shape_comes_back_bit_for_bit_and_other_readers_agree(tensors):
    with tempfile.TemporaryDirectory() as name:
        path = save(Path(name), ("last",), tensors, {"step": 3})
        assert path.name.startswith("step-3-")
        found = load(Path(name))
        assert same(found.tensors, tensors)
        assert found.facts == {"step": 3}
        assert same(safetensors.torch.load_file(path), tensors)


def test_views_of_any_kind_are_saved_by_value(tmp_path):
    base = torch.arange(24, dtype=torch.float64).reshape(4, 6)
    tensors = {
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 5),
        "shared": base,
        "shared again": base[1:],
        "one": base[2, 3],
        "negated": torch._neg_view(base),
        "negated in part": torch.complex(base, base).conj().imag,
        "parameter": nn.Parameter(torch.tensor([1.5, -2.5])),
        "computed": torch.tensor([3.0], requires_grad=True) * 2,
        "flipped": base.flip(0)[:, 1],
    }
    assert tensors["negated"].is_neg()
    save(tmp_path, ("last",), tensors, {})
    found = load(tmp_path).tensors
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.detach())
        assert not found[name].requires_grad
    assert len({tensor.data_ptr() for tensor in found.values()}) == len(found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu_are_saved_by_value_and_load_on_the_cpu(tmp_path):
    on_gpu = {name: tensor.cuda() for name, tensor in small().items()}
    save(tmp_path, ("last",), on_gpu, {})
    assert same(load(tmp_path).tensors, small())
    module = nn.Linear(3, 2, bias=False).cuda()
    load_into(module, {"weight": load(tmp_path).tensors["weight"]})
    assert module.weight.is_cuda
    assert module.weight.eq(1).all()


def test_loaded_tensors_can_be_written_to_and_the_file_stays(tmp_path):
    save(tmp_path, ("last",), small(), {})
    load(tmp_path).tensors["weight"].fill_(9)
    assert same(load(tmp_path).tensors, small())


def test_the_same_tensors_give_the_same_file_whatever_their_order(tmp_path):
    first = save(tmp_path / "a", ("last",), small(), {"step": 1})
    second = save(tmp_path / "b", ("last",), dict(reversed(small().items())), {"step": 1})
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()
    assert (8 + int.from_bytes(first.read_bytes()[:8], "little")) % 8 == 0
    assert first.name != save(tmp_path / "c", ("last",), small(2.0), {"step": 1}).name


def test_no_tensors_and_no_facts_are_a_checkpoint_too(tmp_path):
    save(tmp_path / "deep" / "folder", ("last",), {}, {})
    assert load(tmp_path / "deep" / "folder") == checkpoint.Checkpoint({}, {})


_facts = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
).filter(lambda facts: "step" not in facts)


@settings(max_examples=60, deadline=None)
@given(_facts)
def test_facts_come_back_exactly_even_where_they_are_not_finite(facts):
    with tempfile.TemporaryDirectory() as name:
        save(Path(name), ("last",), {}, facts)
        assert repr(load(Path(name)).facts) == repr(facts)


def test_what_is_written_is_json_to_the_letter(tmp_path):
    facts = {"loss": [math.inf, -math.inf, math.nan, 0.1], "text": "\ud800 é", "big": 2**2048 - 1}
    save(tmp_path, ("last",), {}, facts)

    def refuse(text):
        raise AssertionError(text)

    record = json.loads((tmp_path / "last.json").read_text(), parse_constant=refuse)
    assert record["facts"]["loss"] == [
        {"not-finite": "inf"},
        {"not-finite": "-inf"},
        {"not-finite": "nan"},
        0.1,
    ]
    assert repr(load(tmp_path).facts) == repr(facts)


# What is refused at saving


class _Wrapped(torch.Tensor):
    pass


def _unfit() -> Iterator[tuple[str, object, str]]:
    dense = torch.eye(3)
    yield "sparse", dense.to_sparse(), "torch.sparse_coo"
    yield "meta", torch.empty(3, device="meta"), "meta device"
    yield "complex", torch.ones(2, dtype=torch.complex64), "complex64"
    yield "quantised", torch.ones(2).view(torch.int32).view(torch.qint32), "qint32"
    yield "float8", torch.ones(2).to(torch.float8_e4m3fn), "float8_e4m3fn"
    yield "wrapped", dense.as_subclass(_Wrapped), "_Wrapped"
    yield "list", [1.0], "list"
    yield "", dense, "no name for a tensor"
    yield "__metadata__", dense, "no name for a tensor"


@pytest.mark.parametrize(("name", "tensor", "says"), list(_unfit()), ids=[name or "empty" for name, *_ in _unfit()])
def test_tensors_that_cannot_be_kept_are_refused_by_name_and_nothing_is_written(tmp_path, name, tensor, says):
    save(tmp_path, ("last",), small(), {"step": 1})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, ("last",), small() | {name: tensor}, {"step": 2})
    assert says in str(caught.value)
    assert repr(name) in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def _endless() -> dict:
    facts: dict = {}
    facts["self"] = facts
    return facts


def _deep(levels: int) -> dict:
    facts: dict = {}
    for _ in range(levels):
        facts = {"a": facts}
    return facts


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"rng": {"python": [1, (2, 3)]}}, "facts['rng']['python'][1] is a tuple"),
        ({"a": {1, 2}}, "facts['a'] is a set"),
        ({"a": torch.tensor(1)}, "facts['a'] is a Tensor"),
        ({"a": b"x"}, "facts['a'] is a bytes"),
        ({"a": {1: 2}}, "facts['a'] has the key 1"),
        ({"a": {"not-finite": "nan"}}, "facts['a'] has the key 'not-finite'"),
        ({"a": 2**2048}, "facts['a'] is a number of 2049 bits"),
        ({"step": -1}, "facts['step'] must be a whole number"),
        ({"step": True}, "facts['step'] must be a whole number"),
        ({"step": 1.0}, "facts['step'] must be a whole number"),
        ({"step": "../x"}, "facts['step'] must be a whole number"),
        (_endless(), "nested too deeply"),
        (_deep(100), "nested deeper"),
        ({"a": [0] * 70_000}, "more than the 65536 values"),
        ({"a": "x" * 2**23}, "keep what is large in tensors"),
    ],
)
def test_facts_that_cannot_be_kept_are_refused_with_their_place(tmp_path, facts, says):
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, ("last",), small(), facts)
    assert says in str(caught.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["", "../last", "a/b", "..", ".last", "last.json", "a b", "x" * 65, "läst", "a\n"])
def test_names_that_are_no_plain_words_are_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="no name for a checkpoint"):
        save(tmp_path, ("last", name), {}, {})
    with pytest.raises(CheckpointError, match="no name for a checkpoint"):
        load(tmp_path, name)
    assert os.listdir(tmp_path) == []


# Which files stay


def test_names_share_a_tensor_file_and_each_keeps_its_own(tmp_path):
    save(tmp_path, ("last", "best"), small(1.0), {"step": 1})
    assert len(list(tmp_path.iterdir())) == 3
    for step in (2, 3, 4):
        save(tmp_path, ("last",), small(step), {"step": step})
        assert len(list(tmp_path.iterdir())) == 4
        assert load(tmp_path).facts["step"] == step
        assert load(tmp_path, "best").facts["step"] == 1
        assert same(load(tmp_path).tensors, small(step))
        assert same(load(tmp_path, "best").tensors, small(1.0))
    save(tmp_path, ("last", "best"), small(5.0), {"step": 5})
    assert len(list(tmp_path.iterdir())) == 3


def test_the_next_save_removes_what_killed_savers_left_and_nothing_else(tmp_path, monkeypatch):
    save(tmp_path, ("last",), small(1.0), {"step": 1})
    stale = [
        ".step-9-0123456789ab.safetensors.0123456789abcdef.tmp",
        ".tensors-0123456789ab.safetensors." + "a" * 16,
    ]
    stale = [
        stale[0],
        stale[1] + ".tmp",
        ".best.json.0123456789abcdef.tmp",
        "step-9-0123456789ab.safetensors",
    ]
    others = [
        "mine.safetensors",
        "step-9.safetensors",
        ".note.0123456789abcdef.tmp",
        "notes.txt",
        "config.json",
    ]
    for name in stale + others:
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.json").mkdir()
    real = tensor_file.write

    def write(*arguments):
        assert not set(stale) & set(os.listdir(tmp_path))  # the new file may need their room
        real(*arguments)

    monkeypatch.setattr(tensor_file, "write", write)
    save(tmp_path, ("last",), small(2.0), {"step": 2})
    left = set(os.listdir(tmp_path))
    assert not left & set(stale)
    assert set(others) < left
    assert sorted(path.name for path in tmp_path.glob("step-*-*")) == [_name_in(tmp_path / "last.json")]


def _name_in(commit: Path) -> str:
    return json.loads(commit.read_text())["tensors_file"]


def test_a_damaged_commit_file_keeps_its_tensors_for_repair(tmp_path):
    kept = save(tmp_path, ("last", "best"), small(1.0), {"step": 1})
    best = tmp_path / "best.json"
    whole = best.read_bytes()
    best.write_bytes(whole[:-20])
    save(tmp_path, ("last",), small(2.0), {"step": 2})
    assert kept.exists()
    best.write_bytes(whole)
    assert same(load(tmp_path, "best").tensors, small(1.0))


def test_a_full_disk_at_the_commit_leaves_no_new_tensors_behind(tmp_path, monkeypatch):
    save(tmp_path, ("last",), small(1.0), {"step": 1})
    before = sorted(os.listdir(tmp_path))

    def refuse(*_):
        raise CheckpointError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomically", refuse)
        with pytest.raises(CheckpointError, match="the disk is full"):
            save(tmp_path, ("last",), small(2.0), {"step": 2})
    assert sorted(os.listdir(tmp_path)) == before
    assert load(tmp_path).facts["step"] == 1


# Fitting


class _Tied(nn.Module):
    def __init__(self, size: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, 3)
        self.output = nn.Linear(3, size)
        self.output.weight = self.embedding.weight
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("empty_too", torch.empty(0))


def test_a_module_with_tied_weights_is_restored_in_place(tmp_path):
    torch.manual_seed(3)
    trained, fresh = _Tied(), _Tied()
    trained.count += 7
    save(tmp_path, ("last",), trained.state_dict(), {})
    before = dict(fresh.named_parameters())
    load_into(fresh, load(tmp_path).tensors)
    assert same(fresh.state_dict(), trained.state_dict())
    assert fresh.output.weight is fresh.embedding.weight
    assert all(before[name] is parameter for name, parameter in fresh.named_parameters())
    assert all(parameter.requires_grad for parameter in fresh.parameters())


def test_a_checkpoint_that_does_not_fit_is_explained_and_changes_nothing():
    module = _Tied()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    wrong = {name: tensor.clone() + 1 for name, tensor in before.items()}
    del wrong["count"]
    wrong["extra"] = torch.ones(1)
    wrong["embedding.weight"] = torch.ones(6, 3)
    wrong["output.bias"] = torch.ones(5, dtype=torch.float64)
    with pytest.raises(CheckpointError) as caught:
        load_into(module, wrong)
    message = str(caught.value)
    for part in (
        "does not fit this _Tied",
        "missing: count",
        "unexpected: extra",
        "embedding.weight is (5, 3) float32 here, (6, 3) float32 in the checkpoint",
        "output.bias is (5,) float32 here, (5,) float64 in the checkpoint",
        "Build the model with the settings",
    ):
        assert part in message
    assert "output.weight" not in message
    assert same(module.state_dict(), before)


def test_long_lists_of_misfits_are_cut():
    with pytest.raises(CheckpointError, match="unexpected: 7; and 12 more"):
        load_into(nn.Module(), {str(i): torch.ones(1) for i in range(20)})


def test_weights_that_are_tied_here_must_be_equal_in_the_checkpoint():
    module = _Tied()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    torn = {name: tensor.clone() for name, tensor in before.items()}
    torn["output.weight"][0, 0] += 1
    with pytest.raises(CheckpointError, match=r"embedding\.weight and output\.weight are one tensor here"):
        load_into(module, torn)
    assert same(module.state_dict(), before)


def test_a_module_without_values_is_refused():
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    with pytest.raises(CheckpointError, match="on meta here"):
        load_into(module, nn.Linear(2, 3).state_dict())
