"""Sampling, streaming, beam search and words to offer, against exact probabilities and exhaustive search."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from recurra import decoding
from recurra.cell import select_rows
from recurra.data.vocabulary import Bytes, Characters, Words
from recurra.decoding import (
    Lexicon,
    beam,
    choose,
    completions,
    decode_stream,
    filter_logits,
    generate,
    model_step,
    until,
)
from recurra.errors import ConfigError, DataError, ShapeError


class Trigram(nn.Module):
    """A table: the logits of the next token, given the last two. The state is the last token and a count."""

    def __init__(self, V: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(2 * torch.randn(V, V, V, dtype=torch.float64, generator=generator))

    def forward(self, tokens, state=None):
        if state is None:
            state = (torch.zeros(tokens.shape[1], dtype=torch.int64), torch.zeros(tokens.shape[1], 1))
        last, count = state
        logits = []
        for token in tokens:
            logits.append(self.table[last, token])
            last, count = token, count + 1
        return torch.stack(logits), (last, count)


def log_probabilities(model, tokens):
    """The log probability of each next token after ``tokens``, by reading them all at once."""
    logits, _ = model(torch.tensor(tokens)[:, None])
    return logits[-1, 0].log_softmax(0).tolist()


# Choosing


def chi_square(counts, probabilities):
    """The statistic, and the value that it exceeds once in 10,000 times (Wilson and Hilferty 1931)."""
    total = sum(counts)
    possible = [i for i, p in enumerate(probabilities) if p > 0]
    assert sum(counts[i] for i in possible) == total, "an impossible token was drawn"
    freedom = len(possible) - 1
    statistic = sum((counts[i] - total * probabilities[i]) ** 2 / (total * probabilities[i]) for i in possible)
    return statistic, freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3


def exact(logits, temperature=1.0, top_k=None, top_p=None):
    """The distribution that sampling should have, in plain arithmetic."""
    weights = [math.exp(x / temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))
    order = order[:top_k]
    total = sum(weights[i] for i in order)
    kept, reached = [], 0.0
    for i in order:
        if top_p is not None and reached >= top_p:
            break
        kept.append(i)
        reached += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


LOGITS = [0.3, -1.2, 2.0, 0.0, 1.1, -math.inf, 0.9]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.5},
        {"top_k": 3},
        {"top_p": 0.8},
        {"temperature": 1.4, "top_k": 4, "top_p": 0.75},
    ],
)
def test_draws_follow_the_exact_distribution(settings):
    generator = torch.Generator().manual_seed(7)
    tokens = choose(torch.tensor([LOGITS]).expand(20_000, -1), generator=generator, **settings)
    assert tokens.dtype == torch.int64
    counts = torch.bincount(tokens, minlength=len(LOGITS)).tolist()
    statistic, limit = chi_square(counts, exact(LOGITS, **settings))
    assert statistic < limit


def test_the_statistic_tells_neighbouring_distributions_apart():
    generator = torch.Generator().manual_seed(7)
    tokens = choose(torch.tensor([LOGITS]).expand(20_000, -1), temperature=0.95, generator=generator)
    statistic, limit = chi_square(torch.bincount(tokens, minlength=len(LOGITS)).tolist(), exact(LOGITS))
    assert statistic > limit


def test_temperature_zero_takes_the_first_of_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, -math.inf, 5.0], [-2.0, -2.0, -1.0]])
    assert choose(logits, temperature=0).tolist() == [1, 0, 2]


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e300])
def test_extreme_temperatures_do_not_overflow(temperature):
    logits = torch.tensor([[1e30, -1e30, 0.0]] * 200)
    tokens = choose(logits, temperature=temperature)
    assert set(tokens.tolist()) == ({0} if temperature < 1 else {0, 1, 2})


def test_rows_are_drawn_from_their_own_distribution():
    logits = torch.full((5, 9), -math.inf).scatter(1, torch.tensor([[3], [0], [8], [8], [1]]), 0.5)
    assert choose(logits).tolist() == [3, 0, 8, 8, 1]
    assert choose(torch.zeros(0, 9)).shape == (0,)


def test_a_generator_leaves_the_global_randomness_alone():
    before = torch.get_rng_state()
    first = choose(torch.zeros(64, 50), generator=torch.Generator().manual_seed(3))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, choose(torch.zeros(64, 50), generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(first, choose(torch.zeros(64, 50), generator=torch.Generator().manual_seed(4)))


def test_the_seed_draws_the_same_at_half_precision_of_equal_logits():
    logits = torch.tensor([LOGITS] * 40).bfloat16()
    draw = [choose(x, generator=torch.Generator().manual_seed(1)) for x in (logits, logits.double())]
    assert torch.equal(*draw)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([[0.0, 1.0], [0.0, math.nan]], "row 1 .* nan"),
        ([[0.0, math.inf]], "row 0 .* inf"),
        ([[0.0, 0.0], [0.0, 0.0], [-math.inf, -math.inf]], "row 2 .* no possible token"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_of_a_model_that_diverged_are_refused(logits, message, temperature):
    with pytest.raises(DataError, match=message):
        choose(torch.tensor(logits), temperature=temperature)


@pytest.mark.parametrize(
    "logits", [torch.zeros(5), torch.zeros(1, 2, 3), torch.zeros(2, 0), torch.zeros(2, 3, dtype=torch.int64)]
)
def test_logits_of_another_shape_or_dtype_are_refused(logits):
    with pytest.raises(ShapeError, match=r"\(B, V\)"):
        choose(logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature of 0 or more, got -0.1"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": 0}, "top_k of 1 token or more, got 0"),
        ({"top_p": 0.0}, "above 0 and at most 1, got 0.0"),
        ({"top_p": 1.01}, "above 0 and at most 1, got 1.01"),
        ({"top_p": math.nan}, "top_p"),
    ],
)
def test_settings_out_of_range_are_refused_with_their_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        choose(torch.zeros(1, 3), **settings)
    with pytest.raises(ConfigError, match=message):
        generate(lambda state, tokens: None, None, 0, 5, **settings)


# The head of the distribution


def check_top_k(keep, logits, k):
    kept = [x > -math.inf for x in keep(torch.tensor([logits], dtype=torch.float64), k)[0].tolist()]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    expected = {i for i in order[:k] if logits[i] > -math.inf}
    assert {i for i, stays in enumerate(kept) if stays} == expected


def check_nucleus(keep, logits, p):
    """The smallest set that reaches p: enough, none to spare, none likelier passed over."""
    result = keep(torch.tensor([logits], dtype=torch.float64), p)[0].tolist()
    kept = [i for i, x in enumerate(result) if x > -math.inf]
    weights = [math.exp(x - max(logits)) for x in logits]
    share = [w / math.fsum(weights) for w in weights]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    assert sorted(kept) == sorted(order[: len(kept)])
    assert all(result[i] == logits[i] for i in kept)
    mass = math.fsum(share[i] for i in kept)
    assert mass >= p - 1e-12
    assert mass - min(share[i] for i in kept) < p + 1e-12


some_logits = st.lists(
    st.one_of(st.floats(-8, 8), st.sampled_from([0.0, 1.0, -math.inf])), min_size=1, max_size=12
).filter(lambda logits: max(logits) > -math.inf)


@given(some_logits, st.integers(1, 14))
def test_top_k_keeps_the_k_likeliest_and_the_first_of_equals(logits, k):
    check_top_k(lambda x, k: filter_logits(x, top_k=k), logits, k)


@given(some_logits, st.floats(1e-6, 1))
def test_the_nucleus_is_the_smallest_set_that_reaches_p(logits, p):
    check_nucleus(lambda x, p: filter_logits(x, top_p=p), logits, p)


def test_top_p_of_one_keeps_even_what_rounding_would_lose():
    logits = torch.tensor([[0.0, -60.0, -700.0]])
    assert torch.equal(filter_logits(logits, top_p=1.0), logits)


@pytest.mark.parametrize(
    ("check", "mutant", "setting"),
    [
        (check_top_k, lambda x, k: filter_logits(x, top_k=k + 1), 2),
        (check_top_k, lambda x, k: x.where(x >= x.topk(k).values[:, -1:], -math.inf), 2),
        (check_nucleus, lambda x, p: nucleus_by(x, lambda before, own: before + own < p), 0.7),
        (check_nucleus, lambda x, p: nucleus_by(x, lambda before, own: before - own < p), 0.7),
    ],
    ids=["one too many", "all of equals", "without the crossing token", "one past the crossing token"],
)
def test_mutants_of_the_filters_are_seen(check, mutant, setting):
    with pytest.raises(AssertionError):
        check(mutant, [2.0, 1.0, 1.0, 0.0, -1.0], setting)


def nucleus_by(logits, keeps):
    order = logits[0].argsort(descending=True, stable=True).tolist()
    share, before, result = logits[0].softmax(0).tolist(), 0.0, [-math.inf] * logits.shape[1]
    for i in order:
        if keeps(before, share[i]) or i == order[0]:
            result[i] = float(logits[0, i])
        before += share[i]
    return torch.tensor([result])


# Writing


def test_each_token_is_computed_when_it_is_asked_for_and_none_beyond():
    steps = []

    def step(state, tokens):
        steps.append(tokens.tolist())
        return torch.tensor([[0.0, 5.0, 0.0]]), None

    written = generate(step, None, [2, 0], 3, temperature=0)
    assert steps == []
    assert next(written) == 1
    assert steps == [[2], [0]]
    assert list(written) == [1, 1]
    assert steps == [[2], [0], [1], [1]]


def test_generated_text_is_the_model_read_token_by_token():
    model = Trigram(7)
    settings = {"temperature": 0.8, "top_k": 5, "top_p": 0.9}
    written = list(
        generate(model_step(model), None, [3, 1, 4], 40, generator=torch.Generator().manual_seed(5), **settings)
    )
    generator, tokens = torch.Generator().manual_seed(5), [3, 1, 4]
    for _ in range(40):
        logits, _ = model(torch.tensor(tokens)[:, None])
        tokens.append(int(choose(logits[-1], generator=generator, **settings)))
    assert written == tokens[3:]


def test_the_same_seed_writes_the_same_text_from_a_carried_state():
    step = model_step(Trigram(11))
    _, state = step(None, torch.tensor([4]))
    texts = [list(generate(step, state, 2, 50, generator=torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_token_ends_the_text_and_is_not_part_of_it():
    model = Trigram(5)
    text = list(generate(model_step(model), None, 0, 30, temperature=0))
    stop = text[4]
    assert list(generate(model_step(model), None, 0, 30, temperature=0, stop={stop})) == text[: text.index(stop)]


def test_generation_keeps_no_graph_and_does_not_switch_gradients_off_for_the_caller():
    model = Trigram(5)
    seen = []

    def step(state, tokens):
        logits, state = model(tokens[None], state)
        seen.append(logits.requires_grad)
        return logits[0], state

    written = generate(step, None, 0, 4)
    next(written)
    assert torch.is_grad_enabled()
    assert seen == [False]


def test_generation_refuses_an_empty_beginning_and_a_negative_length():
    with pytest.raises(ConfigError, match="at least one first token"):
        generate(lambda state, tokens: None, None, [], 5)
    with pytest.raises(ConfigError, match="length of 0 tokens or more, got -1"):
        generate(lambda state, tokens: None, None, 0, -1)
    assert list(generate(lambda state, tokens: None, None, 0, 0)) == []


# Text from tokens


@given(st.lists(st.integers(0, 255), max_size=24))
def test_streamed_bytes_are_the_decoded_bytes(ids):
    assert "".join(decode_stream(Bytes(), ids)) == Bytes().decode(ids)


@given(st.text(max_size=12))
def test_streamed_bytes_never_break_a_character(text):
    pieces = list(decode_stream(Bytes(), text.encode()))
    assert [c for piece in pieces for c in piece] == list(text)
    assert len(pieces) == len(text)


def test_a_streamed_character_comes_with_its_last_byte():
    def ids():
        for byte in "aé€".encode():
            fed.append(byte)
            yield byte

    fed: list[int] = []
    assert [(piece, len(fed)) for piece in decode_stream(Bytes(), ids())] == [("a", 1), ("é", 3), ("€", 6)]


WORDS = Words(["<unk>", "the", "cat", ",", ".", "...", "(", ")", "\n", "don't", "猫"])


@given(st.lists(st.integers(0, len(WORDS) - 1), max_size=12))
def test_streamed_words_are_joined_as_the_whole_text_is(ids):
    assert "".join(decode_stream(WORDS, ids)) == WORDS.decode(ids)


@given(st.lists(st.integers(0, 299), max_size=24))
def test_streamed_subwords_are_the_decoded_subwords(ids):
    ids = [token % len(subwords()) for token in ids]
    assert "".join(decode_stream(subwords(), ids)) == subwords().decode(ids)


def test_streamed_subwords_never_break_a_character():
    text = "the cat — 猫 — sat"
    pieces = list(decode_stream(subwords(), subwords().encode(text)))
    assert "".join(pieces) == text
    assert len(pieces) > 8


def subwords(_made=[]):  # noqa: B006
    pytest.importorskip("tokenizers")
    from recurra.data.vocabulary import Subwords

    if not _made:
        _made.append(Subwords.learn(["the cat sat on the mat, the hat and the cart. " * 9], 300))
    return _made[0]


def cut(text, places):
    places = sorted({place % (len(text) + 1) for place in places})
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@given(
    st.text("ab", max_size=20),
    st.text("ab", min_size=1, max_size=5),
    st.lists(st.integers(0, 20), max_size=9),
)
def test_a_stop_string_ends_the_text_wherever_it_was_cut(text, stop, places):
    assert "".join(until(cut(text, places), stop)) == text.split(stop)[0]


@given(st.text("ab", max_size=20), st.text("ab", min_size=1, max_size=5))
def test_nothing_is_held_back_that_cannot_begin_the_stop_string(text, stop):
    text = text.split(stop)[0]
    fed: list[str] = []
    shown = ""
    for piece in until((fed.append(c) or c for c in text), stop):
        shown += piece
        so_far = "".join(fed)
        if so_far != text:
            held = so_far[len(shown) :]
            assert stop.startswith(held)
            assert not any(stop.startswith(so_far[n:]) for n in range(len(shown)) if n < len(so_far))
    assert shown == text


def test_nothing_is_read_behind_the_stop_string():
    source = iter(["one", " ST", "OP and", " more"])
    assert "".join(until(source, "STOP")) == "one "
    assert list(source) == [" more"]


def test_an_empty_stop_string_is_refused_at_once():
    with pytest.raises(ConfigError, match="at least one character"):
        until(iter(["a"]), "")


# Beam search


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


def test_counts_of_draws_do_not_depend_on_the_order_of_rows():
    # Each row has its own draw: two equal rows must not always agree.
    tokens = choose(torch.zeros(1000, 4), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = Counter(zip(tokens[::2], tokens[1::2], strict=True))
    assert len(pairs) == 16
