"""Checkpoints: what goes in comes out, and nothing else does."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from recurra import files
from recurra.errors import CheckpointError
from recurra.training import checkpoint, tensor_file
from recurra.training.checkpoint import load, load_into, save


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and _bits(a[name]) == _bits(b[name])
        for name in a
    )


def _small(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.full((2, 3), value),
        "half": torch.tensor([value, -0.0, math.nan], dtype=torch.bfloat16),
        "mask": torch.tensor([True, False, True]),
        "step": torch.tensor(7),
        "none": torch.empty(0, 4),
    }


def _tensors_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def _rewrite(path: Path, **changes: object) -> None:
    """Change fields of a commit file and give it the digest it then needs."""
    record = json.loads(path.read_text()) | changes
    record.pop("digest")
    record["digest"] = hashlib.blake2b(json.dumps(record).encode(), digest_size=32).hexdigest()
    path.write_text(json.dumps(record) + "\n")


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
        assert _same(found.tensors, tensors)
        assert found.facts == {"step": 3}
        assert _same(safetensors.torch.load_file(path), tensors)


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
    on_gpu = {name: tensor.cuda() for name, tensor in _small().items()}
    save(tmp_path, ("last",), on_gpu, {})
    assert _same(load(tmp_path).tensors, _small())
    module = nn.Linear(3, 2, bias=False).cuda()
    load_into(module, {"weight": load(tmp_path).tensors["weight"]})
    assert module.weight.is_cuda
    assert module.weight.eq(1).all()


def test_loaded_tensors_can_be_written_to_and_the_file_stays(tmp_path):
    save(tmp_path, ("last",), _small(), {})
    load(tmp_path).tensors["weight"].fill_(9)
    assert _same(load(tmp_path).tensors, _small())


def test_the_same_tensors_give_the_same_file_whatever_their_order(tmp_path):
    first = save(tmp_path / "a", ("last",), _small(), {"step": 1})
    second = save(tmp_path / "b", ("last",), dict(reversed(_small().items())), {"step": 1})
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()
    assert (8 + int.from_bytes(first.read_bytes()[:8], "little")) % 8 == 0
    assert first.name != save(tmp_path / "c", ("last",), _small(2.0), {"step": 1}).name


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
    save(tmp_path, ("last",), _small(), {"step": 1})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path, ("last",), _small() | {name: tensor}, {"step": 2})
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
        save(tmp_path, ("last",), _small(), facts)
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
    save(tmp_path, ("last", "best"), _small(1.0), {"step": 1})
    assert len(list(tmp_path.iterdir())) == 3
    for step in (2, 3, 4):
        save(tmp_path, ("last",), _small(step), {"step": step})
        assert len(list(tmp_path.iterdir())) == 4
        assert load(tmp_path).facts["step"] == step
        assert load(tmp_path, "best").facts["step"] == 1
        assert _same(load(tmp_path).tensors, _small(step))
        assert _same(load(tmp_path, "best").tensors, _small(1.0))
    save(tmp_path, ("last", "best"), _small(5.0), {"step": 5})
    assert len(list(tmp_path.iterdir())) == 3


def test_the_next_save_removes_what_killed_savers_left_and_nothing_else(tmp_path, monkeypatch):
    save(tmp_path, ("last",), _small(1.0), {"step": 1})
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
    save(tmp_path, ("last",), _small(2.0), {"step": 2})
    left = set(os.listdir(tmp_path))
    assert not left & set(stale)
    assert set(others) < left
    assert sorted(path.name for path in tmp_path.glob("step-*-*")) == [_name_in(tmp_path / "last.json")]


def _name_in(commit: Path) -> str:
    return json.loads(commit.read_text())["tensors_file"]


def test_a_damaged_commit_file_keeps_its_tensors_for_repair(tmp_path):
    kept = save(tmp_path, ("last", "best"), _small(1.0), {"step": 1})
    best = tmp_path / "best.json"
    whole = best.read_bytes()
    best.write_bytes(whole[:-20])
    save(tmp_path, ("last",), _small(2.0), {"step": 2})
    assert kept.exists()
    best.write_bytes(whole)
    assert _same(load(tmp_path, "best").tensors, _small(1.0))


def test_a_full_disk_at_the_commit_leaves_no_new_tensors_behind(tmp_path, monkeypatch):
    save(tmp_path, ("last",), _small(1.0), {"step": 1})
    before = sorted(os.listdir(tmp_path))

    def refuse(*_):
        raise CheckpointError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomically", refuse)
        with pytest.raises(CheckpointError, match="the disk is full"):
            save(tmp_path, ("last",), _small(2.0), {"step": 2})
    assert sorted(os.listdir(tmp_path)) == before
    assert load(tmp_path).facts["step"] == 1


# Damage


def _unnoticed(folder: Path, damages: Iterator[object]) -> list[object]:
    """Which damages `load` does not refuse, and does not refuse by the right error."""
    found = []
    for damage in damages:
        try:
            load(folder)
        except CheckpointError:
            continue
        found.append(damage)
    return found


def _flips(path: Path) -> Iterator[tuple[str, int]]:
    """Every single bit of the file, flipped while the caller looks."""
    whole = path.read_bytes()
    with open(path, "r+b", buffering=0) as handle:
        for bit in range(8 * len(whole)):
            place = bit // 8
            os.pwrite(handle.fileno(), bytes([whole[place] ^ 1 << bit % 8]), place)
            yield path.suffix, bit
            os.pwrite(handle.fileno(), whole[place : place + 1], place)
    assert path.read_bytes() == whole


def _truncations(path: Path) -> Iterator[tuple[str, int]]:
    whole = path.read_bytes()
    for length in reversed(range(len(whole))):
        os.truncate(path, length)
        yield path.suffix, length
    path.write_bytes(whole)


def _tiny(folder: Path) -> Path:
    save(
        folder,
        ("last",),
        {"w": torch.tensor([1.0, -2.0]), "m": torch.tensor([True])},
        {"step": 1, "loss": 1e-7},
    )
    return _tensors_file(folder)


def test_every_single_bit_flip_is_noticed(tmp_path):
    tensors = _tiny(tmp_path)
    for path in (tensors, tmp_path / "last.json"):
        assert _unnoticed(tmp_path, _flips(path)) == []
    load(tmp_path)


def test_a_loader_without_digests_does_not_notice_flips(tmp_path, monkeypatch):
    tensors = _tiny(tmp_path)
    monkeypatch.setattr(tensor_file, "read", lambda file, *_: safetensors.torch.load(file.read()))

    def load_anything(folder):
        try:
            return checkpoint._load(folder, "last")
        except safetensors.SafetensorError as problem:
            raise CheckpointError from problem

    monkeypatch.setitem(globals(), "load", load_anything)
    assert len(_unnoticed(tmp_path, _flips(tensors))) >= 8 * 9


def test_truncation_at_every_byte_is_noticed(tmp_path):
    tensors = _tiny(tmp_path)
    for path in (tensors, tmp_path / "last.json"):
        assert _unnoticed(tmp_path, _truncations(path)) == []
    for path in (tensors, tmp_path / "last.json"):
        with open(path, "ab") as handle:
            handle.write(b"\n")
        with pytest.raises(CheckpointError, match="is damaged"):
            load(tmp_path)
        path.write_bytes(path.read_bytes()[:-1])
    load(tmp_path)


def test_a_damaged_tensor_is_named_with_its_file_and_the_way_out(tmp_path):
    save(tmp_path, ("best",), _small(1.0), {"step": 1})
    path = save(tmp_path, ("last",), _small(2.0), {"step": 2})
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"\x00\x00\x00@")] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert f"{path} is damaged: tensor 'weight'" in message
    assert message.endswith("resume from the other checkpoint: best")
    (tmp_path / "best.json").unlink()
    with pytest.raises(CheckpointError, match=r"no other checkpoint in .* is whole"):
        load(tmp_path)


def test_another_checkpoint_is_advised_only_if_it_loads(tmp_path):
    path = save(tmp_path, ("last", "best"), _small(1.0), {"step": 1})
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read.*no other checkpoint"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="no other checkpoint"):
        load(tmp_path / "nowhere")
    save(tmp_path, ("last",), _small(2.0), {"step": 2})
    with pytest.raises(CheckpointError, match=r"bset\.json cannot be read.*other checkpoint: last$"):
        load(tmp_path, "bset")


def test_exchanged_tensor_files_are_noticed(tmp_path):
    first = save(tmp_path, ("best",), _small(1.0), {"step": 1})
    second = save(tmp_path, ("last",), _small(2.0), {"step": 2})
    os.rename(first, tmp_path / "x")
    os.rename(second, first)
    os.rename(tmp_path / "x", second)
    for name in ("last", "best"):
        with pytest.raises(CheckpointError, match="tensor 'weight' is not what was saved"):
            load(tmp_path, name)


# What was not written by save


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": "other"}, "its format must be"),
        ({"version": 2}, "of version 2, and this recurra reads 1"),
        ({"version": True}, "its fields must be"),
        ({"version": 1.0}, "its fields must be"),
        ({"extra": 1}, "its fields must be"),
        ({"facts": []}, "its fields must be"),
        ({"size": True}, "its fields must be"),
        ({"tensors": [["w"]]}, "its fields must be"),
        ({"tensors_file": 7}, "its fields must be"),
        ({"size": 2**62}, "do not take"),
        ({"tensors_file": "../elsewhere"}, "is no tensor file"),
        ({"tensors_file": "/etc/passwd"}, "is no tensor file"),
        ({"tensors_file": "step-1-0123456789ab.safetensors\n"}, "is no tensor file"),
        ({"tensors_file": "step-1-0123456789ab.safetensors"}, "cannot be read"),
        ({"tensors": {"w": {"dtype": "F32", "shape": [2]}}}, "a dtype, a shape and a digest"),
        ({"tensors": {"w": [1]}}, "a dtype, a shape and a digest"),
        ({"tensors": {"w": {"dtype": "C64", "shape": [2], "digest": ""}}}, "a dtype among"),
        ({"tensors": {"w": {"dtype": ["F32"], "shape": [2], "digest": ""}}}, "a dtype among"),
        ({"tensors": {"w": {"dtype": "F32", "shape": [-2], "digest": ""}}}, "a shape of"),
        ({"tensors": {"w": {"dtype": "F32", "shape": [True], "digest": ""}}}, "a shape of"),
        ({"tensors": {"w": {"dtype": "F32", "shape": [1.0], "digest": ""}}}, "a shape of"),
        ({"tensors": {"w": {"dtype": "F32", "shape": [1] * 65, "digest": ""}}}, "a shape of"),
        ({"tensors": {"w": {"dtype": "F32", "shape": 2, "digest": ""}}}, "a shape of"),
        ({"tensors": {"w": {"dtype": "F32", "shape": [2**62, 0], "digest": ""}}}, "too large"),
        ({"tensors": {"w": {"dtype": "F32", "shape": [10**4000], "digest": ""}}}, "too large"),
        ({"tensors": {"w": {"dtype": "F32", "shape": [2**40], "digest": ""}}}, "do not take"),
        ({"tensors": {str(i): 0 for i in range(100_000)}}, "more than the 65536 values"),
    ],
)
def test_a_commit_file_made_up_by_hand_is_refused_before_memory_is_taken(tmp_path, monkeypatch, changes, says):
    _tiny(tmp_path)
    _rewrite(tmp_path / "last.json")
    load(tmp_path)
    _rewrite(tmp_path / "last.json", **changes)
    monkeypatch.setattr(torch, "empty", None)
    with pytest.raises(CheckpointError, match=says):
        load(tmp_path)


def test_a_field_left_out_is_noticed(tmp_path):
    _tiny(tmp_path)
    whole = (tmp_path / "last.json").read_text()
    for field in json.loads(whole):
        record = json.loads(whole)
        del record[field]
        digest = record.pop("digest", None)
        if digest:
            digest = hashlib.blake2b(json.dumps(record).encode(), digest_size=32).hexdigest()
            record["digest"] = digest
        (tmp_path / "last.json").write_text(json.dumps(record) + "\n")
        with pytest.raises(CheckpointError, match=r"its f|is damaged|of version None"):
            load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\x80\x04K\x01.",
        b"{}",
        b"[" * 100_000,
        b'{"format": "recurra-checkpoint", "version": 1, "facts": ' + b'{"a":' * 200_000,
        b"{" + b",".join(b'"%d":0' % i for i in range(100_000)) + b"}",
        b'{"tensors": {' + b",".join(b'"%d":{"shape":[1]}' % i for i in range(100_000)) + b"}}",
    ],
)
def test_a_commit_file_that_is_a_bomb_or_none_is_refused(tmp_path, text):
    (tmp_path / "last.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "last.json"))):
        load(tmp_path)


def test_the_same_facts_written_in_another_way_are_not_the_file_that_was_saved(tmp_path):
    _tiny(tmp_path)
    path = tmp_path / "last.json"
    text = path.read_text()
    assert "1e-07" in text
    for other in (
        json.dumps(json.loads(text), indent=1),
        text.replace("1e-07", "1E-07"),
        text.replace('"step": 1', '"step": 1, "step": 1'),
        text.replace('"step"', '"\\u0073tep"'),
        text + " ",
    ):
        assert other != text
        path.write_text(other)
        with pytest.raises(CheckpointError):
            load(tmp_path)


def test_a_header_that_claims_more_than_the_file_has_is_refused(tmp_path):
    path = _tiny(tmp_path)
    whole = path.read_bytes()
    for claim in (2**62, 2**63, 2**64 - 1, len(whole), 0):
        path.write_bytes(claim.to_bytes(8, "little") + whole[8:])
        with pytest.raises(CheckpointError, match="header does not list"):
            load(tmp_path)


def test_a_header_that_lists_other_tensors_is_refused(tmp_path):
    path = _tiny(tmp_path)
    whole = path.read_bytes()
    for old, new in (
        (b'"F32"', b'"I32"'),
        (b'"w"', b'"v"'),
        (b"[2]", b"[1]"),
        (b"[0,8]", b"[1,8]"),
        (b"[0,8]", b"[0,9]"),
    ):
        assert whole.count(old) >= 1
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(CheckpointError, match="header does not list"):
            load(tmp_path)


def test_a_bool_that_is_neither_true_nor_false_is_refused(tmp_path):
    path = _tiny(tmp_path)
    table = json.loads((tmp_path / "last.json").read_text())["tensors"]
    raw = path.read_bytes()
    assert raw[-1] == 1
    path.write_bytes(raw[:-1] + b"\x02")
    table["m"]["digest"] = hashlib.blake2b(b"\x02", digest_size=32).hexdigest()
    _rewrite(tmp_path / "last.json", tensors=table)
    with pytest.raises(CheckpointError, match="'m' is bool, but has values other than 0 and 1"):
        load(tmp_path)


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path):
    home, away = tmp_path / "home", tmp_path / "away"
    save(home, ("last",), _small(), {})
    save(away, ("last",), _small(), {})
    path = _tensors_file(home)
    path.unlink()
    path.symlink_to(_tensors_file(away))
    with pytest.raises(CheckpointError, match="leads out of"):
        load(home)
    (home / "last.json").unlink()
    (home / "last.json").symlink_to(away / "last.json")
    with pytest.raises(CheckpointError, match="leads out of"):
        load(home)


def test_a_pipe_or_a_folder_in_place_of_a_file_is_refused(tmp_path):
    path = _tiny(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="no regular file"):
        load(tmp_path)
    (tmp_path / "last.json").unlink()
    (tmp_path / "last.json").mkdir()
    with pytest.raises(CheckpointError, match="no regular file"):
        load(tmp_path)


def test_a_save_between_the_two_reads_of_a_load_gives_one_checkpoint_or_the_other(tmp_path, monkeypatch):
    save(tmp_path, ("last",), _small(1.0), {"step": 1})
    real, times = files.open_regular, 0

    def slow(path, *error):
        nonlocal times
        if path.suffix == ".safetensors" and times < 3:
            times += 1
            save(tmp_path, ("last",), _small(1.0 + times), {"step": 1 + times})
        return real(path, *error)

    monkeypatch.setattr(files, "open_regular", slow)
    found = load(tmp_path)
    assert found.facts["step"] == 4
    assert _same(found.tensors, _small(4.0))


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
    assert _same(fresh.state_dict(), trained.state_dict())
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
    assert _same(module.state_dict(), before)


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
    assert _same(module.state_dict(), before)


def test_a_module_without_values_is_refused():
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    with pytest.raises(CheckpointError, match="on meta here"):
        load_into(module, nn.Linear(2, 3).state_dict())
