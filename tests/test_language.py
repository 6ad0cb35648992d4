"""Language models: the arithmetic of their figures, what they refuse, every unit and cell from text to text."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from recurra.cells import GRU, LSTM
from recurra.data.corpus import Corpus
from recurra.errors import CheckpointError, ConfigError, DataError, ShapeError
from recurra.tasks.language import Language, LanguageModel, LanguageTask, build_model, figures, score
from recurra.tasks.language_config import CELLS, LanguageConfig, ModelConfig
from recurra.tasks.language_training import resume, train
from recurra.training.config import resolve
from recurra.training.progress import Silent
from recurra.training.run import Run

TEXT = "The quick brown fox jumps over the lazy dog; naïve café, 50 € — said he.\n" * 40


def settings(**flags):
    small = {
        "hidden_size": 8,
        "embedding_size": 6,
        "batch_size": 4,
        "window": 10,
        "epochs": 1,
        "updates": 6,
        "validation": 0.1,
        "test": 0.1,
    }
    return resolve(LanguageConfig, environ={}, flags={**small, **flags})


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "fox.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture
def run(tmp_path, text):
    return train([str(text)], tmp_path / "run", settings(), Silent())[0]


def test_a_model_is_embedding_cell_readout():
    model = LanguageModel(7, 5, GRU(5, 4))
    tokens = torch.tensor([[0, 3], [6, 2], [1, 1]])
    logits, state = model(tokens)
    h = torch.zeros(2, 4)
    for t in range(3):
        h, y = model.rnn.cell.step(h, model.embedding.weight[tokens[t]])
        torch.testing.assert_close(logits[t], y @ model.readout.weight.T + model.readout.bias)
    torch.testing.assert_close(state, h)


def test_a_tied_readout_is_the_embedding_and_stays_it():
    model = LanguageModel(7, 5, LSTM(5, 5), tied=True)
    assert model.readout.weight is model.embedding.weight
    assert len(list(model.parameters())) == 5
    with pytest.raises(ShapeError, match="the embedding's 5 features, got 4"):
        LanguageModel(7, 5, LSTM(5, 4), tied=True)


@pytest.mark.parametrize("streams", [1, 3, 16])
@pytest.mark.parametrize("count", [2, 3, 50, 101])
def test_a_score_counts_every_token_but_the_first_once(count, streams):
    model = build_model(9, ModelConfig(hidden_size=6, embedding_size=4)).double()
    tokens = np.random.default_rng(3).integers(0, 9, count).astype(np.uint8)
    nats, predicted = score(model, tokens, streams, window=7)
    assert predicted == count - 1
    ids = torch.from_numpy(tokens.astype(np.int64))
    if streams == 1:
        with torch.no_grad():
            logits, _ = model(ids[:-1, None])
        assert nats == pytest.approx(F.cross_entropy(logits[:, 0], ids[1:], reduction="sum").item(), abs=1e-9)
    # A model that knows nothing costs log V for each token, however the text is cut.
    for parameter in model.parameters():
        parameter.data.zero_()
    assert score(model, tokens, streams, window=7)[0] == pytest.approx((count - 1) * math.log(9))


def test_figures_are_in_the_units_they_say():
    shown = figures(math.log(8), tokens_per_character=0.5)
    assert shown["bits per character"] == pytest.approx(1.5)
    assert shown["perplexity"] == pytest.approx(8)


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_the_settings_know_trains_and_comes_back_the_same(tmp_path, text, cell):
    weight_drop = 0.0 if cell in ("min-gru", "min-lstm", "mlstm") else 0.2
    flags = {"cell": cell, "layers": 2, "zoneout": 0.1, "dropout": 0.1, "weight_drop": weight_drop}
    run, position = train(
        [str(text)], tmp_path / cell, settings(**flags, layer_norm=True, residual=True, updates=2), Silent()
    )
    language = Language.load(run, "last")
    corpus = Corpus.open(run.path / "corpus")
    nats, count = score(language.model, corpus.split("validation"))
    assert nats / count == pytest.approx(position.best, rel=1e-6)


@pytest.mark.parametrize("unit", ["character", "byte", "word", "subword"])
def test_every_unit_goes_from_text_to_text(tmp_path, text, unit):
    flags = {"unit": unit, "vocabulary_size": 300 if unit == "subword" else None}
    run, _ = train([str(text)], tmp_path / unit, settings(**flags), Silent())
    language = Language.load(run)
    one = "".join(language.sample("The quick", 20, seed=5))
    assert one == "".join(language.sample("The quick", 20, seed=5))
    assert one != "".join(language.sample("The quick", 20, seed=6))
    assert "".join(language.sample(length=5, temperature=0)) is not None


def test_words_go_on_from_the_prompt_as_they_would_in_a_text(tmp_path, text):
    run, _ = train([str(text)], tmp_path / "words", settings(unit="word"), Silent())
    language = Language.load(run)
    prompt = "The quick"
    written = "".join(language.sample(prompt, 8, seed=5))
    tokens = language.vocabulary.encode(prompt + written)
    assert len(tokens) == 2 + 8
    assert language.vocabulary.decode(tokens) == prompt + written
    assert not written.startswith("quick")


def test_weight_drop_on_a_cell_without_recurrent_weights_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="the cell min-gru has none"):
        train([str(text)], tmp_path / "x", settings(cell="min-gru", weight_drop=0.5), Silent())
    assert not (tmp_path / "x").exists()


def test_a_text_too_short_leaves_nothing_behind(tmp_path):
    for content in ("", "abc", "hello world"):
        file = tmp_path / "short.txt"
        file.write_text(content)
        with pytest.raises(DataError):
            train([str(file)], tmp_path / "run", settings(), Silent())
        assert not (tmp_path / "run").exists()


def test_a_prompt_with_unknown_characters_is_refused_by_name(run):
    with pytest.raises(DataError, match=r"the prompt has characters .* .Ω. .U.03A9. at 0"):
        list(Language.load(run).sample("Ω", 5))


def test_another_vocabulary_under_the_same_weights_is_noticed(run):
    file = run.path / "vocabulary.json"
    stored = json.loads(file.read_text())
    letters = stored["characters"]
    stored["characters"] = (
        letters.replace("q", "Q") if isinstance(letters, str) else ["Q" if c == "q" else c for c in letters]
    )
    file.write_text(json.dumps(stored))
    with pytest.raises((CheckpointError, DataError)):
        Language.load(run)


def open_all(path):
    opened = Run.open(path)
    Corpus.open(path / "corpus")
    for name in ("best", "last"):
        Language.load(opened, name)


def test_damage_to_any_file_of_a_run_is_noticed(run):
    Language.load(run)
    for file in sorted(run.path.rglob("*")):
        if not file.is_file() or file.name in (".lock", "metrics.jsonl", "loss.svg"):
            continue
        whole = file.read_bytes()
        for broken in (whole[: len(whole) // 2], b"", b"\x00" * len(whole)):
            file.write_bytes(broken)
            with pytest.raises((CheckpointError, DataError)):
                open_all(run.path)
            file.write_bytes(whole)
    Language.load(run)


def test_resuming_before_the_first_checkpoint_begins_at_the_beginning(tmp_path, text):
    whole, _ = train([str(text)], tmp_path / "whole", settings(), Silent())
    started, _ = train([str(text)], tmp_path / "started", settings(updates=2), Silent())
    for file in started.checkpoints.iterdir():
        file.unlink()
    started.config.write_text(whole.config.read_text())
    resume(started.path, Silent())
    one, other = Language.load(whole, "last").model, Language.load(started, "last").model
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_finished_run_resumes_to_itself(run):
    before = (run.checkpoints / "last.json").read_bytes()
    _, position = resume(run.path, Silent())
    assert position.step == 6
    after = (run.checkpoints / "last.json").read_bytes()
    assert json.loads(before)["tensors"] == json.loads(after)["tensors"]


def test_bits_per_character_of_a_word_model_follow_from_words_and_characters(tmp_path, text):
    run, _ = train([str(text)], tmp_path / "words", settings(unit="word"), Silent())
    corpus = Corpus.open(run.path / "corpus")
    task = LanguageTask(corpus, settings(unit="word"))
    ratio = corpus.tokens["train"] / corpus.characters["train"]
    assert 0.1 < ratio < 0.5
    assert task.figures(1.0)["bits per character"] == pytest.approx(ratio / math.log(2))
