"""Token ids against OpenAI's, truncation, and the widths of batches."""

import importlib.util
import pathlib
import pickle
import unicodedata

import ftfy
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from vop_jax.data.tokenizer import (
    EOT,
    SOT,
    VOCAB_SIZE,
    CaptionTokenizer,
    TokenizedCaptions,
    bucket_widths,
    fit_bucket,
    longest_length,
)
from vop_jax.errors import UserError

TOKENIZER = CaptionTokenizer(77)

# Printed by OpenAI's README and by open_clip 3.
GOLDEN = {
    "a diagram": [320, 22697],
    "a dog": [320, 1929],
    "a cat": [320, 2368],
    "": [],
    "Two women's dogs aren't 12": [1237, 1507, 568, 3255, 4318, 713, 272, 273],
    "&amp;amp; ☕️ don’t": [261, 15499, 847, 713],
}

# Mixed-up encodings, other entities, and a letter that is an s to one engine alone.
NOT_PORTABLE = (
    "&lt;b&gt; R&amp;D &amp;amp;lt; &eacute;t&eacute; &#39;quoted&#39; &#x1F600; &nosuch;",
    "schÃ¶n â€œmojibakeâ€\x9d donâ€™t L&AMP;AMP;ATILDE;&AMP;AMP;SUP3;PEZ",
    "'S 'T it's IT'LL we'Re 'ſ",
)
SURROGATES = "\ud800 lone surrogate \udfff"  # which `tokenizers` cannot take

PORTABLE = (
    *GOLDEN,
    "   spaces\tand\nlines\r\n ",
    "<b>bold</b> &amp;amp; &amp;lt;i&amp;gt; &amp;#39;",  # ftfy unescapes only without tags
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 👍🏽 🇩🇪",
    "一只猫在弹钢琴。猫が歌う 고양이",
    "امرأة تغني على المسرح שלום",
    "zero\u200bwidth\u200djoiner\ufeffmark\u2060",
    "e\u0301tude n\u0303 a\u0308\u0323 Z\u0351\u0344algo\u0362",
    "bell\x07 null\x00 escape\x1b[31m delete\x7f file\x1cgroup\x1d next\x85line",
    "non\u00a0breaking\u2003em\u3000wide\u2028line\u2029paragraph",
    "Donaudampfschifffahrtsgesellschaftskapitän" * 5,
    "a" * 300,
    "!?" * 60,
    "0123456789" * 9,
    "ﬁne ﬀ ＦＵＬＬ ｗｉｄｔｈ ① ½ Ⅷ ²",
    "İstanbul STRASSE straße ſ ΌΣΟΣ ǅ",
    "¿qué? naïve café — “quotes” … «»",
    "\U0010ffff \U000e0001 \ufffe",
)

ODD = (*PORTABLE, *NOT_PORTABLE, SURROGATES)


def row(text: str) -> list[int]:
    return TOKENIZER([text])[0].tolist()


def test_known_ids_and_special_tokens():
    for text, known in GOLDEN.items():
        expected = [SOT, *known, EOT]
        assert row(text) == expected + [0] * (77 - len(expected))
    assert TOKENIZER.encode("a <|EndOfText|>dog <|startoftext|>") == [320, EOT, 1929, SOT]


def test_every_caption_is_framed_and_within_the_vocabulary():
    ids, truncated = CaptionTokenizer(400).with_truncation(ODD)
    assert ids.dtype == np.int32 and not truncated.any()
    for caption_ids in ids:
        eot = caption_ids.argmax()  # as the model reads it
        assert (caption_ids[0], caption_ids[eot]) == (SOT, EOT)
        assert not caption_ids[eot + 1 :].any()
    assert (ids >= 0).all() and (ids < VOCAB_SIZE).all()


@pytest.mark.parametrize("slots", [2, 7])
def test_truncation_keeps_eot_and_is_reported(slots):
    texts = ["a dog " * words for words in range(12)]
    ids, truncated = CaptionTokenizer(slots).with_truncation(texts)
    for text, caption_ids, is_truncated in zip(texts, ids, truncated, strict=True):
        whole = [SOT, *TOKENIZER.encode(text), EOT]
        assert is_truncated == (len(whole) > slots)
        expected = [*whole[: slots - 1], EOT] if is_truncated else whole
        assert caption_ids.tolist() == expected + [0] * (slots - len(expected))
    assert truncated.any() and not truncated.all()
    assert CaptionTokenizer(slots)([]).shape == (0, slots)


def test_invalid_calls_are_refused():
    with pytest.raises(UserError, match=r"vocabulary of 901,629 tokens, .*CLIP's own, of 49,408"):
        CaptionTokenizer(77, 901_629)
    for slots in (1, 0, -3):
        with pytest.raises(UserError, match=f"text length is {slots}: at least 2"):
            CaptionTokenizer(slots)
    for texts in ("a dog", b"a dog", None, 3, iter(["a dog"])):
        with pytest.raises(UserError, match=rf"^texts is .*{type(texts).__name__}.*: a list of"):
            TOKENIZER(texts)
    for text in (None, 7, b"bytes", ["nested"], float("nan")):
        with pytest.raises(UserError, match=f"^text 1 is of type {type(text).__name__}: a string"):
            TOKENIZER(["fine", text])


def test_tokenizer_and_lookup_survive_pickling():
    """The lookup also holds the last id of the vocabulary."""
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(TOKENIZER))(ODD), TOKENIZER(ODD))
    captions = ["a red circle", "", "un éléphant 🐘", "a red circle", "many words " * 40]
    lookup = TokenizedCaptions(captions, TOKENIZER(captions))
    order = ["un éléphant 🐘", captions[-1], "a red circle", ""]
    for table in (lookup, pickle.loads(pickle.dumps(lookup))):
        ids = table(order)
        assert ids.dtype == np.int32 and ids.max() == EOT
        np.testing.assert_array_equal(ids, TOKENIZER(order))


@pytest.fixture(scope="module")
def open_clip_ids():
    """open_clip's tokenizer: texts -> int [N, 77]. Its file alone is imported, not its models."""
    pytest.importorskip("torch", reason="open_clip needs torch")
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("open_clip is not installed")
    file = pathlib.Path(package.origin).with_name("tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def any_text(**options) -> st.SearchStrategy[str]:
    """Unicode text, a good part of it where cleaning and splitting have work to do."""
    spots = st.sampled_from([*" \t\n\x1c\x85\xa0\u200d\ufeff'&;#<|>", "'s", "&amp;", "â€™", "Ã©"])
    words = st.sampled_from(["the", "a", "Dog", "İ", "don't", "12", "ñ", "ﬁ", "猫", "🐈"])
    return st.lists(spots | words | st.characters() | st.text(max_size=8), **options).map("".join)


def special(text: str) -> bool:
    """open_clip spells its special tokens in another way than OpenAI."""
    return any(name in text.lower() for name in ("of_text", "oftext"))


def check_equal(tokenizer, text: str) -> None:
    assert TOKENIZER.encode(text) == tokenizer.encode(text)
    assert row(text) == tokenizer([text])[0].tolist()


def test_equals_open_clip_on_odd_captions(open_clip_ids):
    for text in ODD:
        check_equal(open_clip_ids, text)


@settings(max_examples=100, deadline=None)
@given(any_text(max_size=30).filter(lambda text: not special(text)))
def test_equals_open_clip_on_any_text(open_clip_ids, text):
    check_equal(open_clip_ids, text)


def test_the_portable_tokenizer_makes_the_same_rows():
    ours = CaptionTokenizer(40)
    portable = tokenizers.Tokenizer.from_str(ours.portable())
    texts = [
        *PORTABLE,
        "it\u2019s a \u201cred\u201d \u2018ball\u2019, \u201elow\u201a",
        "\ufb01ne \ufb00 \uff26\uff35\uff2c\uff2c \uff76\uff9e \uffe5",
        "a\x07b\x00c\x7f\ufeff d\x1b[1;31me don\x92t",
        "a &amp; b &lt;b&gt; &amp;amp; &quot;c&quot; &#39;d&#39;&nbsp;e",
        "\u039c\u03ad\u03c3\u03b1 \u039b\u03cc\u03b3\u039f\u03a3 \u03a3\u0391\u03a3.",
        "<|endoftext|> <|startoftext|>",
        "exactly " + "one two three " * 12 + "it",
        "a very long caption " * 40,
    ]
    # Every letter of the Latin to the CJK symbols, and of compatibility and other widths.
    letters = [
        chr(code)
        for code in (*range(0x80, 0x3100), *range(0xFB00, 0xFFFF))
        if unicodedata.category(chr(code)) != "Cn" and chr(code) not in "\u00c2\u00c3\u0345"
    ]
    texts += [" ".join(letters[i : i + 8]) for i in range(0, len(letters), 8)]
    ids = [text.ids for text in portable.encode_batch(texts)]
    np.testing.assert_array_equal(ids, ours(texts))
    for text in NOT_PORTABLE:
        assert portable.encode(text).ids != ours([text])[0].tolist()


def captions(*lengths, slots=20):
    """int32 [N, T] of these numbers of slots, EOT included; noise behind the EOT."""
    ids = np.ones((len(lengths), slots), np.int32)
    ids[np.arange(len(lengths)), np.array(lengths) - 1] = 9
    return ids


@pytest.mark.parametrize(
    ("lengths", "buckets", "width"),
    [((2, 5), (5, 8), 5), ((6, 2), (8, 5), 8), ((9,), (5, 32), 20), ((2,), (), 20)],
)
def test_the_smallest_bucket_that_holds_all(lengths, buckets, width):
    ids = captions(*lengths)
    assert longest_length(ids) == max(lengths)
    np.testing.assert_array_equal(fit_bucket(ids, buckets), ids[:, :width])
    assert longest_length(ids[:0]) == 0


@pytest.mark.parametrize(
    ("long", "batch_size", "expected"),
    [
        (0, 4, (5,)),  # none is long
        (1, 99, (5, 20)),  # once in a hundred times the long one is left out
        (1, 100, (20,)),  # the whole split
        (1, 300, (20,)),
        (5, 74, (20,)),  # 26 * 25 * 24 * 23 * 22 of 100 * 99 * 98 * 97 * 96 is less than RARE
        (5, 73, (5, 20)),
        (100, 4, (20,)),
    ],
)
def test_widths_that_batches_will_have(long, batch_size, expected):
    ids = captions(*[4] * (100 - long), *[9] * long)
    assert bucket_widths(ids, (5,), batch_size) == expected
    assert bucket_widths(ids, (), batch_size) == (20,)


def test_widths_are_those_that_are_met():
    rng = np.random.default_rng(0)
    ids = captions(*rng.integers(2, 21, 300))
    met = {fit_bucket(ids[rng.integers(300, size=3)], (8, 12, 30)).shape[1] for _ in range(2000)}
    assert bucket_widths(ids, (8, 12, 30), 3) == tuple(sorted(met)) == (8, 12, 20)


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters="&")))
def test_printable_ascii_needs_no_repair(text):
    """So that most queries are spared the import of ftfy."""
    assert ftfy.fix_text(text) == text
