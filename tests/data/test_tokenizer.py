import csv
import os
import pickle
import sys
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import processes
from vop_jax.data.tokenizer import (
    EOT,
    SOT,
    VOCAB_SIZE,
    CaptionTokenizer,
    TokenizedCaptions,
    Tokenizer,
)
from vop_jax.errors import UserError

TOKENIZER = Tokenizer()

# Printed by OpenAI's README and by open_clip 3.
GOLDEN = {
    "a diagram": [320, 22697],
    "a dog": [320, 1929],
    "a cat": [320, 2368],
    "": [],
    "Two women's dogs aren't 12": [1237, 1507, 568, 3255, 4318, 713, 272, 273],
    "&amp;amp; ☕️ don’t": [261, 15499, 847, 713],
}

ODD = (
    *GOLDEN,
    "   spaces\tand\nlines\r\n ",
    "&lt;b&gt; R&amp;D &amp;amp;lt; &eacute;t&eacute; &#39;quoted&#39; &#x1F600; &nosuch;",
    "<b>kept</b> &amp;amp; &amp;lt;i&amp;gt; &amp;#39;",  # ftfy unescapes only without tags
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
    "schÃ¶n â€œmojibakeâ€\x9d donâ€™t L&AMP;AMP;ATILDE;&AMP;AMP;SUP3;PEZ",
    "ﬁne ﬀ ＦＵＬＬ ｗｉｄｔｈ ① ½ Ⅷ ²",
    "İstanbul STRASSE straße ſ ΌΣΟΣ ǅ",
    "\ud800 lone surrogate \udfff",
    "'S 'T it's IT'LL we'Re 'ſ",
    "¿qué? naïve café — “quotes” … «»",
    "\U0010ffff \U000e0001 \ufffe",
)

# Mixed-up encodings, other entities, and a letter that is an s to one engine alone.
OURS_ALONE = (
    "&lt;b&gt; R&amp;D &amp;amp;lt; &eacute;t&eacute; &#39;quoted&#39; &#x1F600; &nosuch;",
    "schÃ¶n â€œmojibakeâ€\x9d donâ€™t L&AMP;AMP;ATILDE;&AMP;AMP;SUP3;PEZ",
    "'S 'T it's IT'LL we'Re 'ſ",
)
assert set(OURS_ALONE) < set(ODD)


def row(text: str, length: int = 77) -> list[int]:
    return TOKENIZER([text], length)[0][0].tolist()


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_ids(text):
    expected = [SOT, *GOLDEN[text], EOT]
    assert row(text) == expected + [0] * (77 - len(expected))


@pytest.mark.parametrize("text", ODD)
def test_every_caption_is_framed_and_within_the_vocabulary(text):
    ids, cut = TOKENIZER([text], 400)
    eot = ids[0].argmax()  # as the model reads it
    assert ids.dtype == np.int32 and not cut[0]
    assert ids[0, 0] == SOT and ids[0, eot] == EOT and not ids[0, eot + 1 :].any()
    assert (ids >= 0).all() and (ids < VOCAB_SIZE).all()


def test_special_tokens_spelt_out_get_their_ids_as_at_openai():
    assert TOKENIZER.encode("a <|EndOfText|>dog <|startoftext|>") == [320, EOT, 1929, SOT]


@pytest.mark.parametrize("length", [2, 3, 7, 20])
def test_cutting_keeps_eot_and_is_reported(length):
    texts = ["a dog " * words for words in range(12)]
    ids, cut = TOKENIZER(texts, length)
    for text, got, was_cut in zip(texts, ids, cut, strict=True):
        whole = [SOT, *TOKENIZER.encode(text), EOT]
        assert was_cut == (len(whole) > length)
        expected = [*whole[: length - 1], EOT] if was_cut else whole
        assert got.tolist() == expected + [0] * (length - len(expected))
    assert cut.any() and not cut.all()


def test_a_vocabulary_of_another_tokenizer():
    with pytest.raises(UserError, match=r"vocabulary of 901,629 tokens, .*CLIP's own, of 49,408"):
        CaptionTokenizer(77, 901_629)
    assert CaptionTokenizer(77, VOCAB_SIZE)(["a dog"]).shape == (1, 77)


def test_no_captions():
    ids, cut = TOKENIZER([], 5)
    assert ids.shape == (0, 5) and cut.shape == (0,)


@pytest.mark.parametrize("length", [1, 0, -3])
def test_a_row_without_room_for_the_frame_is_refused(length):
    with pytest.raises(UserError, match=f"text length is {length}: at least 2"):
        TOKENIZER(["a"], length)


@pytest.mark.parametrize("texts", ["a dog", b"a dog", None, 3, iter(["a dog"])])
def test_what_is_no_list_is_refused(texts):
    with pytest.raises(UserError, match=rf"^texts is .*{type(texts).__name__}.*: a list of"):
        TOKENIZER(texts, 77)


@pytest.mark.parametrize("text", [None, 7, 1.5, b"bytes", ["nested"], float("nan")])
def test_a_text_that_is_no_string_is_refused_by_its_place(text):
    with pytest.raises(UserError, match=f"^text 1 is of type {type(text).__name__}: a string"):
        TOKENIZER(["fine", text], 77)


def test_survives_pickling():
    copy = pickle.loads(pickle.dumps(TOKENIZER))
    for ours, theirs in zip(copy(ODD, 77), TOKENIZER(ODD, 77), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_needs_no_jax():
    code = "import sys, vop_jax.data.tokenizer; assert not {'jax', 'flax'} & set(sys.modules)"
    processes.run([sys.executable, "-c", code], check=True)


_KEPT: list = []  # operators last as long as their library object


@pytest.fixture(scope="module")
def open_clip_ids():
    """open_clip's tokenizer: texts -> int [N, 77]."""
    torch = pytest.importorskip("torch", reason="open_clip needs torch")
    try:
        import open_clip.tokenizer
    except ModuleNotFoundError:
        pytest.skip("open_clip is not installed")
    except RuntimeError:
        # torchvision was built for another device than torch and lacks operators, which
        # open_clip's tokenizer does not use: it imports once they have names.
        operators = torch.library.Library("torchvision", "DEF")
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(operators)
        import open_clip.tokenizer
    return open_clip.tokenizer.SimpleTokenizer()


@pytest.mark.parametrize("text", ODD)
def test_equals_open_clip_on_odd_captions(open_clip_ids, text):
    assert row(text) == open_clip_ids([text])[0].tolist()
    assert TOKENIZER.encode(text) == open_clip_ids.encode(text)


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


@settings(max_examples=300, deadline=None)
@given(any_text(max_size=30).filter(lambda text: not special(text)))
def test_equals_open_clip_on_any_text(open_clip_ids, text):
    check_equal(open_clip_ids, text)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(any_text(max_size=120).filter(lambda text: not special(text)))
def test_equals_open_clip_on_much_text(open_clip_ids, text):
    check_equal(open_clip_ids, text)


def test_equals_open_clip_on_the_given_captions(open_clip_ids):
    path = os.environ.get("VOP_JAX_CAPTIONS")
    if not path:
        pytest.skip("VOP_JAX_CAPTIONS names no CSV with a column `sentence`")
    with open(path, newline="", encoding="utf-8") as file:
        captions = [line["sentence"] for line in csv.DictReader(file)]
    assert captions
    ids, cut = TOKENIZER(captions, 77)
    np.testing.assert_array_equal(ids, open_clip_ids(captions).numpy())
    print(f"{len(captions)} captions equal, {cut.sum()} of them cut")


def test_the_portable_tokenizer_makes_the_same_rows():
    made = tokenizers.Tokenizer.from_str(TOKENIZER.portable(40))
    texts = [
        *(text for text in ODD if text not in OURS_ALONE and not set(text) & set("\ud800\udfff")),
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
    found = [text.ids for text in made.encode_batch(texts)]
    np.testing.assert_array_equal(found, TOKENIZER(texts, 40)[0])
    for text in OURS_ALONE:
        assert made.encode(text).ids != row(text, 40)


def test_captions_that_are_tokenized_already_have_the_same_ids():
    """Also after they were sent to another process, and the last id of the vocabulary."""
    captions = ["a red circle", "", "un éléphant 🐘", "a red circle", "many words " * 40]
    tokenize = CaptionTokenizer(20)
    looked_up = TokenizedCaptions(captions, tokenize(captions))
    drawn = ["un éléphant 🐘", captions[-1], "a red circle", ""]
    for either in (looked_up, pickle.loads(pickle.dumps(looked_up))):
        got = either(drawn)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, tokenize(drawn))
    assert got.max() == EOT
