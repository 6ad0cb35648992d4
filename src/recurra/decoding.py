"""From a model's scores to tokens, and from tokens to text: sampling, beam search, words to offer.

Legend: T time, B batch, I input, H hidden, O output, D any feature. V is the size of the vocabulary.

Everything here drives a ``Step``: it takes the carried state and one token a row, and returns the scores of
the next. ``model_step`` makes one of a language model. Nothing here tracks gradients.
"""

from __future__ import annotations

import codecs
import math
import unicodedata
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from recurra.cell import State, select_rows
from recurra.errors import ConfigError, DataError, ShapeError

# (state or None for a fresh one, tokens (B,) int64 on the CPU) -> (logits (B, V) of the next token, state)
Step: TypeAlias = Callable[[State | None, Tensor], tuple[Tensor, State]]


class Vocabulary(Protocol):
    """What decoding asks of a vocabulary. ``unit`` is one of character, byte, word and subword."""

    @property
    def unit(self) -> str: ...
    def __len__(self) -> int: ...
    def encode(self, text: str) -> Any: ...
    def decode(self, ids: Any) -> str: ...


def model_step(model: nn.Module) -> Step:
    """A Step of a language model ``model(tokens (T, B), state) -> (logits (T, B, V), state)``."""
    weight = next(model.parameters(), torch.empty(0))

    @torch.no_grad()
    def step(state: State | None, tokens: Tensor) -> tuple[Tensor, State]:
        logits, state = model(tokens[None].to(weight.device), state)
        return logits[0], state

    return step


def choose(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token for each row of logits (B, V), drawn from their softmax. Returns (B,) int64.

    temperature divides the logits; 0 takes the likeliest token, the first of equals. Then ``top_k`` and
    ``top_p`` leave only the head of the distribution, as in ``filter_logits``. -inf marks a token that
    cannot be. The draw uses ``generator``, on its device, else PyTorch's own.

    Raises ConfigError for a setting out of range, DataError for NaN, +inf or a row with no possible token.
    """
    _check_sampling(temperature, top_k, top_p)
    _check_logits(logits)
    if temperature == 0:
        return logits.argmax(dim=1)
    scores = logits.double()
    if generator is not None:
        scores = scores.to(generator.device)
    # Against the row's largest, so that no temperature can overflow.
    scores = (scores - scores.amax(dim=1, keepdim=True)) / temperature
    probabilities = filter_logits(scores, top_k, top_p).softmax(dim=1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1).to(logits.device)


def filter_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits (B, V) with -inf for all but the head of each row's distribution.

    top_k: the k likeliest stay. top_p: then the smallest set of likeliest tokens stays whose probability among
    those left reaches p (the nucleus: Holtzman et al. 2020, section 3.1). Of equals the first stay.
    """
    V = logits.shape[1]
    if top_k is not None and top_k < V:
        least = logits.topk(top_k, dim=1).values[:, -1:]
        above, tied = logits > least, logits == least
        room = top_k - above.sum(dim=1, keepdim=True)
        logits = logits.where(above | (tied & (tied.cumsum(dim=1) <= room)), -torch.inf)
    if top_p is not None and top_p < 1:
        ranked, order = logits.double().sort(dim=1, descending=True, stable=True)
        probabilities = ranked.softmax(dim=1)
        before = probabilities.cumsum(dim=1) - probabilities
        kept = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before < top_p)
        logits = logits.where(kept, -torch.inf)
    return logits


def generate(
    step: Step,
    state: State | None,
    first: int | Sequence[int],
    length: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """At most ``length`` tokens that follow on ``first``, one row, each computed when it is asked for.

    The token or tokens ``first`` are fed to ``state`` and not given back. A token in ``stop`` ends the text
    and is not given back either. The sampling settings are those of ``choose``.

    Raises ConfigError at once for a setting out of range or an empty ``first``.
    """
    _check_sampling(temperature, top_k, top_p)
    prompt = [first] if isinstance(first, int) else list(first)
    if not prompt:
        raise ConfigError("expected at least one first token to go on from, got none")
    if length < 0:
        raise ConfigError(f"expected a length of 0 tokens or more, got {length}")

    def tokens(state: State | None) -> Iterator[int]:
        fed = prompt
        for _ in range(length):
            with torch.no_grad():
                for token in fed:
                    logits, state = step(state, torch.tensor([token]))
                chosen = choose(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            fed = [int(chosen)]
            if fed[0] in stop:
                return
            yield fed[0]

    return tokens(state)


def decode_stream(vocabulary: Vocabulary, ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come; its pieces together are ``vocabulary.decode`` of all the ids.

    A character is held back until all of its bytes have come.
    """
    if vocabulary.unit == "byte":
        yield from codecs.iterdecode((bytes([token]) for token in ids), "utf-8", "replace")
        return
    before: list[int] = []
    held: list[int] = []
    shown = 0
    for token in ids:
        held.append(token)
        text = vocabulary.decode(before + held)
        # The bytes behind a final U+FFFD may be the beginning of a character.
        if text.endswith("\ufffd"):
            continue
        if text[shown:]:
            yield text[shown:]
        # How a token is joined on depends on the one before it, and on no other.
        before, held = held, []
        shown = len(vocabulary.decode(before))
    if held:
        yield vocabulary.decode(before + held)[shown:]


def until(pieces: Iterable[str], stop: str) -> Iterator[str]:
    """The pieces of a text up to the string ``stop``, wherever the text was cut.

    What might be the beginning of ``stop`` is held back until it is known not to be. Nothing is read once
    ``stop`` was found. Raises ConfigError at once for an empty ``stop``.
    """
    if not stop:
        raise ConfigError("expected a stop string of at least one character, got an empty one")

    def text() -> Iterator[str]:
        held = ""
        for piece in pieces:
            held += piece
            if stop in held:
                held = held[: held.index(stop)]
                break
            ready = len(held) - max(n for n in range(len(stop)) if held.endswith(stop[:n]))
            if ready:
                yield held[:ready]
            held = held[ready:]
        if held:
            yield held

    return text()


def beam(
    step: Step,
    state: State | None,
    start: int,
    width: int,
    length: int,
    finished: Callable[[tuple[int, ...]], bool],
) -> list[tuple[tuple[int, ...], float]]:
    """The likeliest continuations of ``start`` by beam search: (tokens, log probability), best first.

    A continuation ends where ``finished(tokens)`` holds, else after ``length`` tokens. After each step the
    ``width`` likeliest are kept, ended ones among them. So a width that holds every continuation makes the
    search exhaustive. Among equals the choice is always the same.

    ``state`` has one row. Raises ConfigError for a width or length below 1, DataError for NaN logits.
    """
    if width < 1 or length < 1:
        raise ConfigError(f"expected a width and a length of at least 1, got {width} and {length}")
    done: list[tuple[tuple[int, ...], float]] = []
    live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    tokens = torch.tensor([start])
    for _ in range(length):
        with torch.no_grad():
            logits, state = step(state, tokens)
        _check_logits(logits)
        so_far = torch.tensor([score for _, score in live], dtype=torch.float64, device=logits.device)
        scores = so_far[:, None] + logits.double().log_softmax(dim=1)
        pool = [(*entry, -1) for entry in done]
        for row, token in _largest(scores, width):
            pool.append(((*live[row][0], token), float(scores[row, token]), row))
        pool = sorted(pool, key=lambda entry: (-entry[1], entry[0]))[:width]
        done, live, rows = [], [], []
        for found, score, row in pool:
            if row < 0 or finished(found):
                done.append((found, score))
            else:
                live.append((found, score))
                rows.append(row)
        if not live:
            break
        state = select_rows(state, torch.tensor(rows))
        tokens = torch.tensor([found[-1] for found, _ in live])
    return sorted(done + live, key=lambda entry: (-entry[1], entry[0]))


def _largest(scores: Tensor, count: int) -> list[tuple[int, int]]:
    """Row and column of the ``count`` largest of scores (B, V), of equals the first; none that is -inf."""
    flat = scores.flatten()
    count = min(count, int((flat > -torch.inf).sum()))
    if count == 0:
        return []
    # Which of several equals topk takes is not said, so it only finds the threshold.
    candidates = (flat >= flat.topk(count).values[-1]).nonzero().squeeze(1)
    order = flat[candidates].argsort(descending=True, stable=True)[:count]
    return [divmod(index, scores.shape[1]) for index in candidates[order].tolist()]


class Lexicon:
    """The tokens of a vocabulary by what they can do to a word, and by how their text begins. Made once."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        texts = [vocabulary.decode([token]) for token in range(len(vocabulary))]
        if vocabulary.unit == "word":
            texts = ["" if text == "<unk>" else text for text in texts]
        self._order = sorted(range(len(texts)), key=texts.__getitem__)
        self._sorted = [texts[token] for token in self._order]
        shown = torch.tensor([text != "" and all(map(_shows, text)) for text in texts])
        inner = torch.tensor([text != "" and _is_word(text[0]) for text in texts])
        if vocabulary.unit == "word":
            # A word is one token, and a punctuation mark does not lead to it.
            shown &= inner
        # Tokens that stand before a word or begin one; that go on with a word; that end it.
        self.opening, self.inner, self.ending = (mask.nonzero().squeeze(1) for mask in (shown, shown & inner, ~inner))

    def beginning_with(self, text: str) -> Tensor:
        """The tokens whose text begins with ``text``, int64."""
        low = bisect_left(self._sorted, text)
        high = bisect_right(self._sorted, text, low, key=lambda known: known[: len(text)])
        return torch.tensor(self._order[low:high], dtype=torch.int64)

    def within(self, text: str) -> Tensor:
        """The tokens that ``text`` begins with, shorter than it, int64."""
        found: list[int] = []
        for n in range(1, len(text)):
            low, high = (side(self._sorted, text[:n]) for side in (bisect_left, bisect_right))
            found += self._order[low:high]
        return torch.tensor(found, dtype=torch.int64)

    def first_word(self, text: str) -> str:
        """A text up to the end of its first word; "" while none has ended."""
        start = next((i for i, c in enumerate(text) if _is_word(c)), len(text))
        if self.vocabulary.unit == "word":
            return text if start < len(text) else ""
        end = next((i for i in range(start, len(text)) if not _is_word(text[i])), len(text))
        return text[:end] if end < len(text) else ""


_PARTIAL = "\ufffd"  # for a character of which some bytes are still to come
_JOINERS = "\u200c\u200d"


def _is_word(character: str) -> bool:
    return character in "_'\u2019" + _JOINERS + _PARTIAL or unicodedata.category(character)[0] in "LMN"


def _shows(character: str) -> bool:
    return character.isprintable() or character in _JOINERS


@torch.no_grad()
def completions(
    step: Step,
    state: State | None,
    logits: Tensor,
    lexicon: Lexicon,
    tail: str = "",
    count: int = 5,
    *,
    width: int = 32,
    longest: int = 32,
) -> list[tuple[str, float]]:
    """The next words: (text to append, probability), distinct, best first, at most ``count``.

    ``state`` (one row) and ``logits`` (1, V) come after all of the text but ``tail``, which is typed but not
    yet read: what is offered goes on from it, and the probability is given the tail. An offer runs to the end
    of the first word: after "The c" it is "at", after "The cat" perhaps " sat" or "tle". All ways to spell it
    in tokens count, and all that may end the word.

    A beam search over at most ``longest`` tokens, ended when no better word can come; exact for characters
    where ``width`` holds every hypothesis. Raises DataError for NaN logits.
    """
    found: defaultdict[str, float] = defaultdict(float)
    reached = 0.0 if tail else 1.0
    live: list[tuple[tuple[int, ...], str, float]] = [((), "", 1.0)]
    for _ in range(longest):
        _check_logits(logits)
        probabilities = logits.double().softmax(dim=1).cpu()
        pool: list[tuple[float, tuple[int, ...], int]] = []
        ended: list[tuple[str, float]] = []
        for row, (spelt, text, mass) in enumerate(live):
            p, rest, offer = mass * probabilities[row], tail[len(text) :], text[len(tail) :]
            if rest:
                covering = lexicon.beginning_with(rest)
                reached += float(p[covering].sum())
                tokens = torch.cat([covering, lexicon.within(rest)])
            elif any(map(_is_word, offer)):
                ended.append((offer, float(p[lexicon.ending].sum())))
                tokens = lexicon.inner
            else:
                tokens = lexicon.opening
            best = p[tokens].topk(min(width, len(tokens)))
            pairs = zip(best.values.tolist(), tokens[best.indices].tolist(), strict=True)
            pool += [(share, (*spelt, token), row) for share, token in pairs if share > 0]
        live, rows = [], []
        for share, spelt, row in sorted(pool, key=lambda entry: (-entry[0], entry[1]))[:width]:
            text = lexicon.vocabulary.decode(spelt)
            word = lexicon.first_word(text[len(tail) :])
            if word:
                ended.append((word, share))
            else:
                live.append((spelt, text, share))
                rows.append(row)
        for word, share in ended:
            if share > 0 and _can_be_offered(word):
                found[word] += share
        offers = sorted(found.items(), key=lambda entry: (-entry[1], entry[0]))[:count]
        # All that still grows could together bring no better word.
        settled = len(offers) == count and offers[-1][1] >= sum(share for _, _, share in live)
        if not live or (settled and all(len(text) >= len(tail) for _, text, _ in live)):
            break
        state = select_rows(state, torch.tensor(rows))
        logits, state = step(state, torch.tensor([spelt[-1] for spelt, _, _ in live]))
    return [(word, share / reached) for word, share in offers]


def _can_be_offered(word: str) -> bool:
    return _PARTIAL not in word and all(map(_shows, word)) and any(map(str.isalnum, word))


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"expected a temperature of 0 or more, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"expected top_k of 1 token or more, got {top_k}: leave it out to keep all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"expected top_p above 0 and at most 1, got {top_p}: leave it out to keep all tokens")


def _check_logits(logits: Tensor) -> None:
    if logits.dim() != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
        raise ShapeError(
            f"expected floating-point logits (B, V), V at least 1, got {tuple(logits.shape)} {logits.dtype}"
        )
    best = logits.amax(dim=1)
    if not bool(best.isfinite().all()):
        row = int((~best.isfinite()).nonzero()[0])
        what = "no possible token: every logit is -inf" if best[row] == -torch.inf else f"a logit of {best[row]}"
        raise DataError(f"row {row} of the logits has {what}; expected finite numbers, so the model has diverged")
