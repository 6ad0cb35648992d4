"""Beam search and the words to offer, against exhaustive search."""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict

import pytest
import torch

from recurra import decoding
from recurra.cell import select_rows
from recurra.data.vocabulary import Bytes, Characters, Words
from recurra.decoding import (
    Lexicon,
    beam,
    completions,
    generate,
    model_step,
)
from recurra.errors import ConfigError, DataError
from small_languages import Trigram, log_probabilities


def every_continuation(model, start, length, finished):
    """All continuations and their log probabilities, by reading each of them whole."""
    done, open_ = [], [((), 0.0)]
    while open_:
        tokens, score = open_.pop()
        if tokens and (len(tokens) == length or finished(tokens)):
            done.append((tokens, score))
            continue
        for token, p in enumerate(log_probabilities(model, [start, *tokens])):
            open_.append(((*tokens, token), score + p))
    return done


def ends_with_zero(tokens):
    return tokens[-1] == 0


def twice_the_same(tokens):
    return len(tokens) > 1 and tokens[-1] == tokens[-2]


@pytest.mark.parametrize("finished", [ends_with_zero, twice_the_same, lambda tokens: False])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_beam_that_holds_everything_is_exhaustive_search(finished, seed):
    model = Trigram(4, seed)
    expected = every_continuation(model, 2, 4, finished)
    found = beam(model_step(model), None, 2, 1000, 4, finished)
    assert dict(found) == pytest.approx(dict(expected), abs=1e-12)
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    assert math.fsum(math.exp(score) for _, score in found) == pytest.approx(1)


@pytest.mark.parametrize("width", [1, 2, 3, 7])
def test_a_narrow_beam_gives_true_scores_in_order_and_no_more_than_its_width(width):
    model = Trigram(6, 3)
    everything = dict(every_continuation(model, 1, 4, ends_with_zero))
    found = beam(model_step(model), None, 1, width, 4, ends_with_zero)
    assert len(found) == width
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    for tokens, score in found:
        assert score == pytest.approx(everything[tokens], abs=1e-12)


def test_a_beam_of_one_is_greedy():
    model = Trigram(9, 5)
    greedy = tuple(generate(model_step(model), None, 4, 12, temperature=0))
    assert [tokens for tokens, _ in beam(model_step(model), None, 4, 1, 12, lambda tokens: False)] == [greedy]


def test_a_beam_finds_what_greedy_search_misses():
    # Token 1 is likelier at first, but all that follows it is unlikely.
    logits = {
        0: [-math.inf, 0.4, 0.0, -math.inf],
        1: [0.0, 0.0, 0.0, 0.0],
        2: [-math.inf, -math.inf, -math.inf, 0.0],
    }
    table = torch.zeros(4, 4, 4, dtype=torch.float64)
    for token, row in logits.items():
        table[:, token] = torch.tensor(row)
    model = Trigram(4)
    model.table.data = table
    (best, _), _ = beam(model_step(model), None, 0, 2, 2, lambda tokens: False)
    assert best == (2, 3)
    assert list(generate(model_step(model), None, 0, 1, temperature=0)) == [1]


def test_a_state_that_is_not_reordered_with_the_beam_is_seen(monkeypatch):
    model = Trigram(5, 1)
    right = beam(model_step(model), None, 2, 9, 4, ends_with_zero)

    def in_order(state, rows):
        return select_rows(state, torch.arange(len(rows)) % len(state[0]))

    monkeypatch.setattr(decoding, "select_rows", in_order)
    assert beam(model_step(model), None, 2, 9, 4, ends_with_zero) != right


def test_equal_continuations_come_in_the_order_of_their_tokens():
    def step(state, tokens):
        return torch.zeros(len(tokens), 3), torch.zeros(len(tokens), 1)

    found = beam(step, None, 0, 4, 2, lambda tokens: False)
    assert [tokens for tokens, _ in found] == [(0, 0), (0, 1), (0, 2), (1, 0)]


def test_impossible_tokens_are_in_no_continuation():
    def step(state, tokens):
        return torch.tensor([[0.0, -math.inf, 1.0]]).expand(len(tokens), -1), torch.zeros(len(tokens), 1)

    found = beam(step, None, 0, 50, 3, lambda tokens: False)
    assert sorted(tokens for tokens, _ in found) == sorted(itertools.product([0, 2], repeat=3))


def test_a_beam_refuses_bad_sizes_and_bad_logits():
    with pytest.raises(ConfigError, match="width and a length of at least 1, got 0 and 3"):
        beam(lambda state, tokens: None, None, 0, 0, 3, ends_with_zero)
    with pytest.raises(DataError, match="nan"):
        beam(lambda state, tokens: (torch.tensor([[0.0, math.nan]]), None), None, 0, 2, 3, ends_with_zero)


# Words to offer


class Pieces:
    """A vocabulary of subwords that are joined as they are."""

    unit = "subword"

    def __init__(self, *pieces):
        self.pieces = pieces

    def __len__(self):
        return len(self.pieces)

    def encode(self, text):
        raise NotImplementedError

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


def every_completion(model, vocabulary, start, tail, longest):
    """All words that can follow, by going through every sequence of tokens and reading it whole."""
    pieces = [vocabulary.decode([token]) for token in range(len(vocabulary))]
    found, reached = defaultdict(float), 0.0
    open_ = [((), 1.0)]
    while open_:
        tokens, mass = open_.pop()
        text = vocabulary.decode(tokens)
        offer = text[len(tail) :]
        if re.fullmatch(r"\W*\w+\W.*", offer):
            found[re.match(r"\W*\w+", offer).group()] += mass
        elif len(tokens) < longest:
            for token, p in enumerate(log_probabilities(model, [start, *tokens])):
                share, piece, after = mass * math.exp(p), pieces[token], text + pieces[token]
                if len(text) < len(tail):
                    if piece and after.startswith(tail):
                        reached += share
                        open_.append(((*tokens, token), share))
                    elif piece and tail.startswith(after):
                        open_.append(((*tokens, token), share))
                elif re.search(r"\w", offer) and not re.match(r"\w", piece):
                    found[offer] += share
                elif piece and "\n" not in piece:
                    open_.append(((*tokens, token), share))
    if not tail:
        reached = 1.0
    offers = [(text, mass / reached) for text, mass in found.items()]
    return sorted(offers, key=lambda entry: (-entry[1], entry[0]))


def offered(model, vocabulary, start, tail="", count=1000, **settings):
    logits, state = model_step(model)(None, torch.tensor([start]))
    return completions(model_step(model), state, logits, Lexicon(vocabulary), tail, count, **settings)


@pytest.mark.parametrize(
    ("vocabulary", "start", "tail"),
    [
        (Characters("ab .\n"), 2, ""),
        (Characters("ab .\n"), 4, ""),
        (Pieces("a", "b", " ", "ab", " a", "\n"), 2, ""),
        (Pieces("a", "b", " ", "ab", " a", "\n"), 0, "ab"),
        (Pieces("a", "b", " ", "ab", " ab", "b ", "\n"), 6, " ab"),
        (Pieces("a", "aa", "a a", "", " "), 4, "aaa"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_search_that_holds_everything_offers_what_exhaustive_search_finds(vocabulary, start, tail, seed):
    model = Trigram(len(vocabulary), seed)
    expected = every_completion(model, vocabulary, start, tail, 4)
    found = offered(model, vocabulary, start, tail, width=100_000, longest=4)
    assert len(expected) > 5
    assert dict(found) == pytest.approx(dict(expected), abs=1e-12)
    assert [p for _, p in found] == sorted((p for _, p in found), reverse=True)


@pytest.mark.parametrize("seed", range(4))
def test_a_narrow_search_that_stops_early_still_offers_the_best_words(seed):
    model, vocabulary = Trigram(5, seed), Characters("ab .\n")
    expected = every_completion(model, vocabulary, 4, "", 6)[:3]
    assert dict(offered(model, vocabulary, 4, count=3, width=64)) == pytest.approx(dict(expected), abs=1e-9)


def test_the_search_stops_when_no_better_word_can_come():
    steps = []
    vocabulary = Characters("ab .")
    sure = torch.full((4,), -20.0, dtype=torch.float64)
    follows = {" ": "a", "a": "b", "b": "."}

    def step(state, tokens):
        steps.append(len(tokens))
        rows = []
        for token in tokens:
            row = sure.clone()
            row[int(vocabulary.encode(follows.get(vocabulary.decode([int(token)]), " "))[0])] = 0
            rows.append(row)
        return torch.stack(rows), torch.zeros(len(tokens), 1)

    logits, state = step(None, torch.tensor(vocabulary.encode(" ").astype("int64")))
    [(word, probability)] = completions(step, state, logits, Lexicon(vocabulary), count=1)
    assert word == "ab"
    assert probability == pytest.approx(1, abs=1e-6)
    assert len(steps) <= 4


def test_an_early_end_waits_for_all_spellings_of_the_tail():
    vocabulary, model = Pieces("a", "aab ", "."), Trigram(3)
    model.table.data = torch.tensor([0.3, 0.65, 0.05], dtype=torch.float64).log().expand(3, 3, 3)
    (best, probability), *_ = every_completion(model, vocabulary, 2, "aa", 12)
    assert offered(model, vocabulary, 2, "aa", count=1) == [(best, pytest.approx(probability, abs=1e-3))]
    assert best == "b"


def test_word_models_offer_the_likeliest_words_that_begin_as_typed():
    vocabulary = Words(["<unk>", "cat", "cart", "dog", "car", ",", "\n", "don't"])
    logits = torch.tensor([[9.0, 1.0, 2.0, 5.0, 0.0, 7.0, 8.0, -1.0]])
    step = model_step(Trigram(len(vocabulary)))
    share = logits[0].double().exp()

    def offers(tail):
        state = (torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1))
        return dict(completions(step, state, logits, Lexicon(vocabulary), tail, 3, width=8))

    among = share[1] + share[2] + share[4]
    assert offers("ca") == pytest.approx(
        {"rt": float(share[2] / among), "t": float(share[1] / among), "r": float(share[4] / among)}
    )
    assert list(offers("do")) == ["g", "n't"]
    assert offers("x") == {}
    assert offers("<") == {}
    top = offers("")
    assert list(top) == ["dog", "cart", "cat"]
    assert top["dog"] == pytest.approx(float(share[3] / share.sum()))


def test_a_whole_word_is_followed_by_the_next_with_the_usual_spaces():
    vocabulary = Words(["<unk>", "cat", "(", "sat"])
    table = torch.zeros(4, 4, 4, dtype=torch.float64)
    model = Trigram(4)
    model.table.data = table
    state = (torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1))
    for tail, expected in (("cat", " sat"), ("(", "sat")):
        found = completions(model_step(model), state, torch.zeros(1, 4), Lexicon(vocabulary), tail, 9)
        assert expected in dict(found)


def test_bytes_that_end_no_word_or_make_no_character_are_not_offered():
    follows = dict(itertools.pairwise([ord("\n"), *"né—x".encode()]))

    def step(state, tokens):
        logits = torch.full((len(tokens), 256), -30.0)
        for row, token in zip(logits, tokens.tolist(), strict=True):
            row[follows.get(token, ord("x"))] = 0
        return logits, torch.zeros(len(tokens), 1)

    logits, state = step(None, torch.tensor([ord("\n")]))
    found = completions(step, state, logits, Lexicon(Bytes()), count=3)
    assert found[0][0] == "né"
    assert found[0][1] == pytest.approx(1, abs=1e-3)
    assert all("\ufffd" not in word and word.isprintable() for word, _ in found)


def test_offers_are_distinct_and_hold_no_control_characters():
    vocabulary = Pieces("a", "aa", " ", "\x1b[2J", "\t", "\u202e", "!", "b\x07")
    found = offered(Trigram(8), vocabulary, 2, count=200, width=500, longest=4)
    words = [word for word, _ in found]
    assert len(set(words)) == len(words) > 5
    assert not set("".join(words)) - set("ab !")
    assert all(re.search(r"\w", word) for word in words)


def test_completions_refuse_the_numbers_of_a_model_that_diverged():
    with pytest.raises(DataError, match="nan"):
        completions(lambda s, t: None, None, torch.full((1, 3), math.nan), Lexicon(Characters("ab ")))
