"""Checkpoints that were damaged, exchanged or made up: each is refused, and the message says what to do."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from checkpoints import rewrite, same, small, tensors_file
from recurra import files
from recurra.errors import CheckpointError
from recurra.training import checkpoint, tensor_file
from recurra.training.checkpoint import load, save

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
    return tensors_file(folder)


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
    save(tmp_path, ("best",), small(1.0), {"step": 1})
    path = save(tmp_path, ("last",), small(2.0), {"step": 2})
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"\x00\x00\x00@")] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert f"{path} is damaged: tensor 'weight'" in message
    assert message.endswith("the checkpoint best is whole: use it, or copy best.json to last.json to resume from it")
    (tmp_path / "best.json").unlink()
    with pytest.raises(CheckpointError, match=r"no other checkpoint in .* is whole"):
        load(tmp_path)


def test_another_checkpoint_is_advised_only_if_it_loads(tmp_path):
    path = save(tmp_path, ("last", "best"), small(1.0), {"step": 1})
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read.*no other checkpoint"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="no other checkpoint"):
        load(tmp_path / "nowhere")
    save(tmp_path, ("last",), small(2.0), {"step": 2})
    with pytest.raises(
        CheckpointError, match=r"bset\.json cannot be read.*last is whole.*copy last\.json to bset\.json"
    ):
        load(tmp_path, "bset")


def test_exchanged_tensor_files_are_noticed(tmp_path):
    first = save(tmp_path, ("best",), small(1.0), {"step": 1})
    second = save(tmp_path, ("last",), small(2.0), {"step": 2})
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
    rewrite(tmp_path / "last.json")
    load(tmp_path)
    rewrite(tmp_path / "last.json", **changes)
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
    rewrite(tmp_path / "last.json", tensors=table)
    with pytest.raises(CheckpointError, match="'m' is bool, but has values other than 0 and 1"):
        load(tmp_path)


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path):
    home, away = tmp_path / "home", tmp_path / "away"
    save(home, ("last",), small(), {})
    save(away, ("last",), small(), {})
    path = tensors_file(home)
    path.unlink()
    path.symlink_to(tensors_file(away))
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
    save(tmp_path, ("last",), small(1.0), {"step": 1})
    real, times = files.open_regular, 0

    def slow(path, *error):
        nonlocal times
        if path.suffix == ".safetensors" and times < 3:
            times += 1
            save(tmp_path, ("last",), small(1.0 + times), {"step": 1 + times})
        return real(path, *error)

    monkeypatch.setattr(files, "open_regular", slow)
    found = load(tmp_path)
    assert found.facts["step"] == 4
    assert same(found.tensors, small(4.0))
