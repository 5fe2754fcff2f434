"""Captions become token ids: OpenAI CLIP's byte-pair encoding, truncation and bucket widths.

The ids equal those of OpenAI's tokenizer for every text. A caption is framed by SOT and EOT,
truncated to the slots of the text tower, padded with zeros; a batch then keeps only as many slots
as the smallest bucket that holds its longest caption.
"""

import functools
import gzip
import html
from collections.abc import Sequence
from importlib import resources

import numpy as np
import regex
import tokenizers
from tokenizers import normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from vop_jax.errors import UserError

VOCAB_SIZE = 49408
SOT = VOCAB_SIZE - 2
EOT = VOCAB_SIZE - 1
# A caption that spells one of these out gets its id, as OpenAI's tokenizer does.
SPECIAL = {"<|startoftext|>": SOT, "<|endoftext|>": EOT}
RARE = 1e-3  # share of the batches below which a width is not compiled in advance

# Not the splitter of `tokenizers`: the Unicode tables of its regex engine differ from OpenAI's.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORD = regex.compile("|".join([*map(regex.escape, SPECIAL), _WORDS]), regex.IGNORECASE)
_SPACE = regex.compile(r"\s+")

# BPE works on visible letters: a printable byte is its own Latin-1 letter, the others follow
# from U+0100 on, in order.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_LETTERS = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(0x100 + i) for i, byte in enumerate(_HIDDEN)
}


class CaptionTokenizer:
    """Captions -> rows of token ids. It can be pickled.

    Args:
        slots: T, the length of a row.
        vocab_size: of the model.

    Raises:
        UserError: the model uses another vocabulary, or `slots` has no room for SOT and EOT.
    """

    def __init__(self, slots: int, vocab_size: int = VOCAB_SIZE):
        if vocab_size != VOCAB_SIZE:
            raise UserError(
                f"this CLIP has a vocabulary of {vocab_size:,} tokens, not CLIP's own, of "
                f"{VOCAB_SIZE:,}: there is no tokenizer for it here"
            )
        if slots < 2:
            raise UserError(f"text length is {slots}: at least 2 are needed, for SOT and EOT")
        self.slots = slots
        self._bpe = _load_bpe()

    def __reduce__(self) -> tuple[type["CaptionTokenizer"], tuple[int]]:
        return CaptionTokenizer, (self.slots,)

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """int32 [N, T]; a caption that is too long is truncated and keeps its EOT."""
        return self.with_truncation(captions)[0]

    def with_truncation(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(int32 [N, T], bool [N]: whether each caption was truncated).

        Raises:
            UserError: `captions` is not a list of strings.
        """
        if isinstance(captions, str | bytes) or not hasattr(captions, "__len__"):
            kind = type(captions).__name__
            raise UserError(f"texts is of type {kind}: a list of strings is needed")
        ids = np.zeros((len(captions), self.slots), np.int32)
        truncated = np.zeros(len(captions), bool)
        for i, caption in enumerate(captions):
            if not isinstance(caption, str):
                kind = type(caption).__name__
                raise UserError(f"text {i} is of type {kind}: a string is needed")
            row = [SOT, *self.encode(caption), EOT]
            truncated[i] = len(row) > self.slots
            if truncated[i]:
                row[self.slots - 1 :] = [EOT]
            ids[i, : len(row)] = row
        return ids, truncated

    def lengths(self, captions: Sequence[str]) -> np.ndarray:
        """int [N]: slots that each whole caption takes, SOT and EOT included."""
        return np.array([len(self.encode(caption)) + 2 for caption in captions], int)

    def encode(self, caption: str) -> list[int]:
        """Ids of a caption of any length, without SOT and EOT."""
        ids: list[int] = []
        for word in _WORD.findall(clean(caption)):
            if word in SPECIAL:
                ids.append(SPECIAL[word])
            else:
                letters = word.encode().decode("latin-1").translate(_BYTE_LETTERS)
                ids.extend(token.id for token in self._bpe.tokenize(letters))
        return ids

    def portable(self) -> str:
        """The JSON of a `tokenizers.Tokenizer` that makes the same rows.

        It lacks the repair of mixed encodings, rare HTML entities and this module's Unicode tables.
        """
        portable = tokenizers.Tokenizer(self._bpe)
        portable.add_special_tokens([*SPECIAL])
        portable.normalizer = normalizers.Sequence(
            [
                *_letter_repairs(),
                normalizers.NFC(),
                normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
                normalizers.Strip(),
                # Python's lower case has a letter of its own for a sigma that ends a word.
                normalizers.Replace(tokenizers.Regex(r"(?<=\p{L})Σ(?!\p{L})"), "ς"),
                normalizers.Lowercase(),
            ]
        )
        portable.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_WORDS), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        start, end = SPECIAL
        portable.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}", special_tokens=[*SPECIAL.items()]
        )
        portable.enable_truncation(self.slots)
        portable.enable_padding(length=self.slots, pad_id=0, pad_token=portable.id_to_token(0))
        return portable.to_str()


class TokenizedCaptions:
    """A lookup of ids by caption: drawing another caption in each epoch does not tokenize it again.

    Args:
        captions: N.
        ids: int32 [N, T], row i of caption i.
    """

    def __init__(self, captions: Sequence[str], ids: np.ndarray):
        self._ids = ids.astype(np.uint16)  # half the memory, also of what worker processes receive
        self._row_of = {caption: row for row, caption in enumerate(captions)}

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """int32 [N, T]."""
        return self._ids[[self._row_of[caption] for caption in captions]].astype(np.int32)


def clean(text: str) -> str:
    """OpenAI's cleaning: repairs encodings and HTML entities, single spaces, lower case."""
    if not (text.isascii() and text.isprintable()) or "&" in text:  # else ftfy changes nothing
        import ftfy  # late, as most queries do not need it

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _SPACE.sub(" ", text).strip().lower()


def longest_length(ids: np.ndarray) -> int:
    """Slots that the longest of the captions [N, T] takes, up to its EOT, the largest id."""
    return int(ids.argmax(axis=-1).max(initial=-1)) + 1


def fit_bucket(ids: np.ndarray, buckets: Sequence[int]) -> np.ndarray:
    """int32 [N, T] -> [N, T'], the smallest bucket that holds all captions, or T itself."""
    length = longest_length(ids)
    return ids[:, : min((width for width in buckets if width >= length), default=ids.shape[1])]


def bucket_widths(ids: np.ndarray, buckets: Sequence[int], batch_size: int) -> tuple[int, ...]:
    """Widths, ascending, that `fit_bucket` gives batches of the captions [N, T], but for the RARE.

    A batch fits a width if all its captions do. If n of N captions fit, a batch drawn without
    repetition fits with probability n / N * (n - 1) / (N - 1) * …
    """
    count, slots = ids.shape
    allowed = sorted({slots, *(min(width, slots) for width in buckets)})
    lengths, draws = ids.argmax(axis=-1) + 1, np.arange(min(batch_size, count))
    fitting = [np.sum(lengths <= width) for width in allowed]
    chances = [np.prod(np.maximum(n - draws, 0) / (count - draws)) for n in fitting]
    shares = np.diff(chances, prepend=0.0)
    return tuple(width for width, share in zip(allowed, shares, strict=True) if share >= RARE)


@functools.cache
def _load_bpe() -> BPE:
    packed = resources.files("vop_jax.data") / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode().split("\n")
    # The vocabulary: 256 bytes, the same bytes at the end of a word, the merges, 2 special tokens.
    merges: list[tuple[str, str]] = []
    for line in lines[1 : VOCAB_SIZE - 2 * 256 - 2 + 1]:
        first, second = line.split()
        merges.append((first, second))
    alphabet = sorted(_BYTE_LETTERS.values())
    vocabulary = alphabet + [letter + "</w>" for letter in alphabet]
    vocabulary += [first + second for first, second in merges]
    ids = {token: i for i, token in enumerate(vocabulary)}
    return BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>")


def _letter_repairs() -> list[normalizers.Normalizer]:
    """The repairs of `clean` that are simple replacements: HTML entities and single letters."""
    from ftfy import fixes

    entities = ("lt", "gt", "quot", "apos", "#39", "nbsp", "amp")
    rules: list[normalizers.Normalizer] = [
        normalizers.Replace(f"&{entity};", html.unescape(f"&{entity};"))
        for _ in range(2)  # as `clean` unescapes
        for entity in entities
    ]
    rules.append(normalizers.Replace(tokenizers.Regex(r"\x1b\[[0-9;]*[A-Za-z]"), ""))
    letters_of: dict[str, list[str]] = {}  # repaired letter -> letters that become it
    for code in (*range(0xD800), *range(0xE000, 0x10000)):
        letter = repaired = chr(code)
        for repair in (
            fixes.fix_c1_controls,
            fixes.fix_latin_ligatures,
            fixes.fix_character_width,
            fixes.uncurl_quotes,
            fixes.fix_line_breaks,
            fixes.remove_control_chars,
        ):
            repaired = repair(repaired)
        if repaired != letter:
            letters_of.setdefault(repaired, []).append(letter)
    for repaired, letters in letters_of.items():
        pattern = "".join(f"\\x{{{ord(letter):x}}}" for letter in letters)
        rules.append(normalizers.Replace(tokenizers.Regex(f"[{pattern}]"), repaired))
    return rules
