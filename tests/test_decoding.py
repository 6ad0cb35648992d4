"""Sampling against exact distributions, and text written token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recurra.decoding import (
    choose,
    filter_logits,
    generate,
    model_step,
)
from recurra.errors import ConfigError, DataError, ShapeError
from small_languages import Trigram


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


def test_each_row_has_a_draw_of_its_own():
    # Of two equal rows, every pair of outcomes must come.
    tokens = choose(torch.zeros(1000, 4), generator=torch.Generator().manual_seed(0)).tolist()
    assert len(set(zip(tokens[::2], tokens[1::2], strict=True))) == 16


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
