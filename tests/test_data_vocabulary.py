"""Vocabularies: exact round trips, readable words, and nothing accepted that was not written here."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from recurra.data import vocabulary as module
from recurra.data import words
from recurra.data.vocabulary import Bytes, Characters, Subwords, Words, vocabulary_from_json
from recurra.decoding import decode_stream
from recurra.errors import DataError

TEXT = (
    "It was the best of times, it was the worst of times; it was the age of wisdom...\n"
    "“Well-known”, she said (twice): don't pay 3.14 % — naïve Größe, हिन्दी में, 東京タワー!\n\n"
) * 3

ANY = st.text(st.characters(codec="utf-8"))
SUBWORDS = Subwords.learn([TEXT], 300)


def _all():
    return [Characters(TEXT), Bytes(), Words.learn([TEXT], 40), SUBWORDS]


# --- round trips ---


@given(text=ANY.filter(bool), data=st.data())
def test_characters_round_trip(text, data):
    vocabulary = Characters(text + data.draw(ANY))
    tokens = vocabulary.encode(text)
    assert [vocabulary.characters[t] for t in tokens] == list(text)
    assert vocabulary.decode(tokens) == text


@given(text=ANY)
def test_bytes_round_trip(text):
    tokens = Bytes().encode(text)
    assert tokens.tolist() == list(text.encode())
    assert Bytes().decode(tokens) == text


@given(text=ANY | st.text("the age of wisdom,.\n \t\x1c\u2028é"))
def test_subwords_round_trip(text):
    assert SUBWORDS.decode(SUBWORDS.encode(text)) == text


@given(text=ANY)
def test_subwords_encode_as_the_package_does(text):
    import tokenizers

    assert SUBWORDS.encode(text).tolist() == tokenizers.Tokenizer.from_str(SUBWORDS.tokenizer).encode(text).ids


@given(data=st.binary())
def test_bytes_that_are_no_text_decode_with_replacements(data):
    assert Bytes().decode(list(data)) == data.decode("utf-8", "replace")


# Marks, letters of several scripts, digits and white space that meet in unexpected ways.
# Few characters at a time, so that they do meet.
_MIXED = st.sampled_from(
    [
        "..-! a\n",
        "中ア\u3099\u0301 a.",
        "31٣.,a _",
        "<unk> .",
        '$$()[] "a',
        "é\u0301\u093f\u200d\U000e0100 a",
        "'’-“”a \x1c",
        "=*#/:;?% \t",
    ]
).flatmap(st.text)


@given(text=ANY | _MIXED)
@example(text=". . .. ! !")
@example(text='$ $ ( ( [ " "')
@example(text="a \u3099中 \u3099b \u0301 \u0301")
@example(text="3 . 5 3. 5 3 ,5 a' b")
def test_words_read_back_from_their_own_text_are_the_same(text):
    tokens = words.split(text)
    assert words.split(words.join(tokens)) == tokens


@given(text=ANY | _MIXED)
def test_words_lose_nothing_but_white_space(text):
    assert "".join("".join(words.split(text)).split()) == "".join(text.split())
    assert words.split(text).count("\n") == text.count("\n")


@given(text=_MIXED, unit=st.integers(0, 3))
def test_a_text_decoded_as_it_comes_is_the_text_decoded_whole(text, unit):
    vocabulary = [Characters(text + "x"), Bytes(), Words.learn([text], 9), SUBWORDS][unit]
    tokens = vocabulary.encode(text)
    assert "".join(decode_stream(vocabulary, tokens)) == vocabulary.decode(tokens)


# --- words ---


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("It's 3.14, well-known!", ["It's", "3.14", ",", "well-known", "!"]),
        ("a.b 1,000.5 x", ["a", ".", "b", "1,000.5", "x"]),
        ("3.x b.5 4,c", ["3", ".", "x", "b", ".", "5", "4", ",", "c"]),
        ("wait... -- no\n\n", ["wait", "...", "--", "no", "\n", "\n"]),
        ("rock <unk> roll<unk>", ["rock", "<unk>", "roll", "<unk>"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ناصر می‌خواهم", ["ناصر", "می‌خواهم"]),
        ("נִקּוּד", ["נִקּוּד"]),
        ("東京タワーabc", ["東", "京", "タ", "ワ", "ー", "abc"]),
        ("cafe\u0301s", ["cafe\u0301s"]),
        ("한국어 글", ["한국어", "글"]),
        ("'quoted'", ["'", "quoted", "'"]),
        ("\t \r\u2028", []),
        ("😀😀", ["😀", "😀"]),
    ],
)
def test_words_marks_and_newlines_are_tokens_in_any_script(text, tokens):
    assert words.split(text) == tokens


@pytest.mark.parametrize(
    "text",
    [
        "It was, at times; the worst: (so) said [he]!\nWhat? 50% of $5.\n",
        "“Well,” she said.",
        "東京タワー、です。",
    ],
)
def test_usual_text_is_joined_as_it_is_written(text):
    assert words.join(words.split(text)) == text


def test_the_most_frequent_words_are_kept_and_the_rest_is_unknown():
    text = "d d d c c c b b a <unk> <unk> <unk> <unk>\n"
    vocabulary = Words.learn([text, text], 4)
    assert vocabulary.words == ("<unk>", "c", "d", "b")
    assert vocabulary.encode("a b <unk> d").tolist() == [0, 3, 0, 2]
    assert vocabulary.decode([0, 3, 2]) == "<unk> b d"


@given(text=st.text("abcde \n", max_size=200), size=st.integers(2, 9))
def test_words_are_ranked_by_count_and_then_by_spelling(text, size):
    counts = Counter(text.replace("\n", " \n ").replace(" ", "\0").split("\0"))
    del counts[""]
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    assert list(Words.learn([text], size).words) == ["<unk>", *ranked][:size]


def test_counting_words_forgets_the_rare_and_keeps_the_frequent(monkeypatch):
    monkeypatch.setattr(module, "MOST_WORDS", 100)
    texts = [f"often often then{n % 3} " + " ".join(f"w{n}x{m}" for m in range(30)) for n in range(50)]
    assert set(Words.learn(texts, 5).words[:5]) == {"<unk>", "often", "then0", "then1", "then2"}


def test_a_forgotten_word_is_counted_anew(monkeypatch):
    monkeypatch.setattr(module, "MOST_WORDS", 20)
    texts = ["x " + " ".join(f"w{n}" for n in range(30)), "x y y"]
    assert Words.learn(texts, 3).words == ("<unk>", "y", "x")


def test_an_endless_word_is_not_counted():
    assert Words.learn(["a" * 5000 + " b"], 9).words == ("<unk>", "b")


# --- subwords ---


def test_subwords_learn_the_same_twice_and_shorten_what_they_know():
    again = Subwords.learn([TEXT], 300)
    assert again == SUBWORDS
    assert 256 < len(SUBWORDS) <= 300
    assert len(SUBWORDS.encode(TEXT)) < 0.7 * len(TEXT.encode())


def test_subwords_without_the_package_say_what_to_install():
    program = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "from recurra.data.vocabulary import Subwords\n"
        "from recurra.errors import MissingExtraError\n"
        "try: Subwords.learn(['a'], 300)\n"
        "except MissingExtraError as problem: print(problem)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "pip install 'recurra[text]'" in out


# --- what is refused ---


def test_unknown_characters_are_named_with_their_first_places():
    with pytest.raises(DataError) as caught:
        Characters("abc").encode("abécédé¿!?" + "xyz" * 3, where="novel.txt", start=1000)
    message = str(caught.value)
    assert message.startswith("novel.txt has characters")
    places = [("é", 1002), ("d", 1005), ("¿", 1007), ("!", 1008), ("?", 1009)]
    assert ", ".join(f"{c!r} (U+{ord(c):04X}) at {place}" for c, place in places) + " and 3 others" in message
    assert "--unit byte" in message


@pytest.mark.parametrize("character", ["\0", "b", "d", "\U0010ffff", "\ud800"])
def test_a_character_below_between_and_beyond_the_known_is_unknown(character):
    with pytest.raises(DataError, match="at 1 "):
        Characters("ace").encode("a" + character)


@pytest.mark.parametrize("vocabulary", [Bytes(), SUBWORDS], ids=["byte", "subword"])
def test_half_a_character_is_refused(vocabulary):
    with pytest.raises(DataError, match=r"prompt has half a character, '\\ud800', at 12 "):
        vocabulary.encode("ab\ud800", "prompt", start=10)


@pytest.mark.parametrize("index", range(4))
def test_tokens_outside_are_refused_and_the_last_one_is_not(index):
    vocabulary = _all()[index]
    vocabulary.decode([len(vocabulary) - 1])
    for wrong in (-1, len(vocabulary), 2**40):
        with pytest.raises(DataError, match=f"token {wrong} is outside"):
            vocabulary.decode([0, wrong])
        with pytest.raises(DataError, match="is outside"):
            vocabulary.piece(wrong)
    for wrong in ([0.5], [[1, 2]], [True]):
        with pytest.raises(DataError, match="expected tokens"):
            vocabulary.decode(wrong)
    assert vocabulary.decode([]) == ""
    assert len(vocabulary.encode("")) == 0


@pytest.mark.parametrize(
    ("size", "dtype"), [(2, "uint8"), (256, "uint8"), (257, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32")]
)
def test_the_dtype_is_the_smallest_that_holds_the_vocabulary(size, dtype):
    vocabulary = Words(["<unk>", *(f"w{n}" for n in range(1, size))])
    assert vocabulary.dtype == dtype
    tokens = vocabulary.encode(f"w{size - 1}")
    assert tokens.dtype == dtype
    assert tokens.tolist() == [size - 1]


def test_pieces_are_visible():
    assert [Characters("\n é\x00").piece(n) for n in range(4)] == ["\\x00", "\\n", "␣", "é"]
    assert [Bytes().piece(n) for n in (10, 32, 97, 0xE9)] == ["\\n", "␣", "a", "\\xe9"]
    assert Words(["<unk>", "\n", "word"]).piece(1) == "\\n"
    assert SUBWORDS.piece(int(SUBWORDS.encode(" the")[0])) == "␣the"
    assert SUBWORDS.piece(int(SUBWORDS.encode("𝄞")[0])) == "\\xf0"


# --- JSON ---


@pytest.mark.parametrize("index", range(4))
def test_json_gives_the_same_vocabulary(index):
    vocabulary = _all()[index]
    again = vocabulary_from_json(json.loads(json.dumps(vocabulary.to_json())))
    assert again == vocabulary
    assert again.encode("the age of").tolist() == vocabulary.encode("the age of").tolist()
    assert all(again != other for n, other in enumerate(_all()) if n != index)
    assert str(len(vocabulary)) in repr(vocabulary)


_WRONG = [
    None,
    [],
    "byte",
    {},
    {"unit": None},
    {"unit": ["byte"]},
    {"unit": "bytes"},
    {"unit": "byte", "size": 256},
    {"unit": "character"},
    {"unit": "character", "characters": ""},
    {"unit": "character", "characters": ["a", "b"]},
    {"unit": "character", "characters": "ba"},
    {"unit": "character", "characters": "aab"},
    {"unit": "character", "characters": "a\ud800"},
    {"unit": "word", "words": []},
    {"unit": "word", "words": {}},
    {"unit": "word", "words": ["a", "<unk>"]},
    {"unit": "word", "words": ["<unk>", "a", "a"]},
    {"unit": "word", "words": ["<unk>", ""]},
    {"unit": "word", "words": ["<unk>", 5]},
    {"unit": "subword", "tokenizer": 5},
    {"unit": "subword", "tokenizer": ""},
    {"unit": "subword", "tokenizer": "{"},
    {"unit": "subword", "tokenizer": "[]"},
    {"unit": "subword", "tokenizer": "{}"},
    {"unit": "subword", "tokenizer": "[" * 100_000},
]


@pytest.mark.parametrize("value", _WRONG, ids=range(len(_WRONG)))
def test_wrong_json_is_refused(value):
    with pytest.raises(DataError, match="no vocabulary"):
        vocabulary_from_json(value)


def _mutations():
    whole = json.loads(SUBWORDS.tokenizer)

    def changed(change):
        value = copy.deepcopy(whole)
        change(value)
        return value

    return {
        "another model": changed(lambda v: v["model"].update(type="Unigram")),
        "another pre-tokenizer": changed(lambda v: v["pre_tokenizer"].update(type="Whitespace")),
        "a space put before": changed(lambda v: v["pre_tokenizer"].update(add_prefix_space=True)),
        "a normalizer": changed(lambda v: v.update(normalizer={"type": "Lowercase"})),
        "no merges": changed(lambda v: v["model"].pop("merges")),
        "a vocabulary as list": changed(lambda v: v["model"].update(vocab=["a"])),
        "a gap": changed(lambda v: v["model"]["vocab"].update({"ĠĠĠ": 5000})),
        "a huge number": changed(lambda v: v["model"]["vocab"].update({"ĠĠĠ": 2**70})),
        "a number twice": changed(lambda v: v["model"]["vocab"].update({"ĠĠĠ": 7})),
        "a number that is none": changed(lambda v: v["model"]["vocab"].update({"!": False})),
        "a spelling that is none": changed(lambda v: v["model"]["vocab"].update({"東": len(v["model"]["vocab"])})),
        "an empty spelling": changed(lambda v: v["model"]["vocab"].update({"": len(v["model"]["vocab"])})),
        "a byte missing": changed(lambda v: v["model"].update(vocab={"a": 0}, merges=[])),
        # The package ends the program at this one.
        "a merge of nothing known": changed(lambda v: v["model"]["merges"].append(["z", "q"])),
        "a merge of three": changed(lambda v: v["model"]["merges"].append(["a", "b", "c"])),
        "a merge of numbers": changed(lambda v: v["model"]["merges"].append([1, 2])),
    }


@pytest.mark.parametrize("name", _mutations())
def test_a_wrong_tokenizer_is_refused_before_the_package_sees_it(name):
    with pytest.raises(DataError, match="no vocabulary of subwords"):
        Subwords(json.dumps(_mutations()[name]))


@given(place=st.integers(0, len(SUBWORDS.tokenizer) - 1), data=st.characters(codec="utf-8"))
def test_a_tokenizer_with_one_character_changed_works_or_is_refused(place, data):
    text = SUBWORDS.tokenizer
    try:
        vocabulary = Subwords(text[:place] + data + text[place + 1 :])
    except DataError:
        return
    assert vocabulary.decode(vocabulary.encode(TEXT)) == TEXT


def test_a_vocabulary_needs_a_character():
    with pytest.raises(DataError, match="at least one"):
        Characters("")


def test_tokens_of_numpy_and_of_lists_decode_alike():
    assert Bytes().decode(np.array([104, 105], np.uint8)) == Bytes().decode([104, 105]) == "hi"
