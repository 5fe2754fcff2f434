"""OpenAI CLIP's byte-pair encoding: captions to token ids, equal to OpenAI's in every id."""

import gzip
import html
from collections.abc import Sequence
from importlib import resources

import ftfy
import numpy as np
import regex
import tokenizers
from tokenizers import normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from vop_jax.errors import UserError

VOCAB_SIZE = 49408
SOT = VOCAB_SIZE - 2
EOT = VOCAB_SIZE - 1
# A caption that spells one of these out gets its id, as it does at OpenAI.
SPECIAL = {"<|startoftext|>": SOT, "<|endoftext|>": EOT}

# Not `tokenizers`' own splitter: its regex engine has other Unicode tables than OpenAI's.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_WORD = regex.compile("|".join([*map(regex.escape, SPECIAL), _WORDS]), regex.IGNORECASE)
_SPACE = regex.compile(r"\s+")
_LETTER_REPAIRS = (
    ftfy.fixes.fix_c1_controls,
    ftfy.fixes.fix_latin_ligatures,
    ftfy.fixes.fix_character_width,
    ftfy.fixes.uncurl_quotes,
    ftfy.fixes.fix_line_breaks,
    ftfy.fixes.remove_control_chars,
)

# BPE works on visible letters: a printable byte is its own Latin-1 letter, the others follow
# from U+0100 on, in order.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_LETTERS = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(0x100 + i) for i, byte in enumerate(_HIDDEN)
}


class Tokenizer:
    """Turns captions into rows of token ids. Build it once; it can be pickled."""

    def __init__(self) -> None:
        packed = resources.files("vop_jax.data") / "bpe_simple_vocab_16e6.txt.gz"
        lines = gzip.decompress(packed.read_bytes()).decode().split("\n")
        # The file goes on past the vocabulary: 256 bytes, the same at a word's end, 2 special.
        merges = [_pair(line) for line in lines[1 : VOCAB_SIZE - 2 * 256 - 2 + 1]]
        alphabet = sorted(_BYTE_LETTERS.values())
        vocabulary = alphabet + [letter + "</w>" for letter in alphabet]
        vocabulary += [first + second for first, second in merges]
        self._bpe = BPE(
            vocab={token: i for i, token in enumerate(vocabulary)},
            merges=merges,
            end_of_word_suffix="</w>",
        )

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[()]]:
        return Tokenizer, ()

    def __call__(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of captions, each framed by SOT and EOT and padded with zeros.

        Args:
            texts: N captions; an empty one is SOT EOT.
            length: T, the row length. A longer caption is cut; its last id stays EOT.

        Returns:
            ids, int32 [N, T], and whether each caption was cut, bool [N].

        Raises:
            UserError: `length` has no room for SOT and EOT, `texts` is not a list of strings.
        """
        if length < 2:
            raise UserError(f"text length is {length}: at least 2 are needed, for SOT and EOT")
        if isinstance(texts, str | bytes) or not hasattr(texts, "__len__"):
            raise UserError(f"texts is of type {type(texts).__name__}: a list of strings is needed")
        ids = np.zeros((len(texts), length), np.int32)
        cut = np.zeros(len(texts), bool)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"text {i} is of type {type(text).__name__}: a string is needed")
            row = [SOT, *self.encode(text), EOT]
            cut[i] = len(row) > length
            if cut[i]:
                row[length - 1 :] = [EOT]
            ids[i, : len(row)] = row
        return ids, cut

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        """int [N]: ids of each whole caption, SOT and EOT among them."""
        return np.array([len(self.encode(text)) + 2 for text in texts], int)

    def encode(self, text: str) -> list[int]:
        """Ids of one caption of any length, without SOT and EOT."""
        ids: list[int] = []
        for word in _WORD.findall(clean(text)):
            if word in SPECIAL:
                ids.append(SPECIAL[word])
            else:
                letters = word.encode().decode("latin-1").translate(_BYTE_LETTERS)
                ids.extend(token.id for token in self._bpe.tokenize(letters))
        return ids

    def portable(self, length: int) -> str:
        """The JSON of `tokenizers.Tokenizer` that makes rows of `length` ids as this one does.

        Of `clean` it has what changes letter by letter and the commonest HTML entities; not the
        repair of encodings that were mixed up, other entities, and this module's Unicode tables.
        """
        made = tokenizers.Tokenizer(self._bpe)
        made.add_special_tokens(sorted(SPECIAL, key=SPECIAL.__getitem__))
        made.normalizer = normalizers.Sequence(
            [
                *_letters_repaired(),
                normalizers.NFC(),
                normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
                normalizers.Strip(),
                # Python's lower case has a letter of its own for a sigma that ends a word.
                normalizers.Replace(tokenizers.Regex(r"(?<=\p{L})Σ(?!\p{L})"), "ς"),
                normalizers.Lowercase(),
            ]
        )
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_WORDS), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        start, end = sorted(SPECIAL, key=SPECIAL.__getitem__)
        made.post_processor = processors.TemplateProcessing(
            single=f"{start} $A {end}", special_tokens=[*SPECIAL.items()]
        )
        made.enable_truncation(length)
        made.enable_padding(length=length, pad_id=0, pad_token=made.id_to_token(0))
        return made.to_str()


def _pair(line: str) -> tuple[str, str]:
    first, second = line.split()
    return first, second


def _letters_repaired() -> list[normalizers.Normalizer]:
    """The repairs of ftfy that look at one letter at a time, and HTML's commonest entities.

    Curly quotes, ligatures, letters of full or half width, control characters, the escapes of
    terminals.
    """
    steps = [
        (f"&{entity};", html.unescape(f"&{entity};"))
        for _ in range(2)  # as `clean`
        for entity in ("lt", "gt", "quot", "apos", "#39", "nbsp", "amp")
    ]
    of_letter: dict[str, list[str]] = {}
    for code in (*range(0xD800), *range(0xE000, 0x10000)):
        letter = repaired = chr(code)
        for repair in _LETTER_REPAIRS:
            repaired = repair(repaired)
        if repaired != letter:
            of_letter.setdefault(repaired, []).append(letter)
    replace: list[normalizers.Normalizer] = [normalizers.Replace(*step) for step in steps]
    replace.append(normalizers.Replace(tokenizers.Regex(r"\x1b\[[0-9;]*[A-Za-z]"), ""))
    for repaired, letters in of_letter.items():
        inside = "".join(f"\\x{{{ord(letter):x}}}" for letter in letters)
        replace.append(normalizers.Replace(tokenizers.Regex(f"[{inside}]"), repaired))
    return replace


def clean(text: str) -> str:
    """OpenAI's cleaning: encoding and HTML entities mended, one space between words, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _SPACE.sub(" ", text).strip().lower()


RARE = 1e-3  # of all batches


def longest(ids: np.ndarray) -> int:
    """Slots that the longest of the captions [N, T] takes, its EOT, the largest id, included."""
    return int(ids.argmax(axis=-1).max(initial=-1)) + 1


def cut(ids: np.ndarray, buckets: Sequence[int]) -> np.ndarray:
    """int32 [N, T] -> [N, T'], the smallest bucket that holds all of them, or T itself."""
    needed = longest(ids)
    return ids[:, : min((width for width in buckets if width >= needed), default=ids.shape[1])]


def widths(ids: np.ndarray, buckets: Sequence[int], batch_size: int) -> tuple[int, ...]:
    """Ascending: what `cut` makes of batches drawn from the captions [N, T], but for the RARE.

    A batch fits a width if all its captions do: of n of N that fit, none drawn twice, by chance
    n / N * (n - 1) / (N - 1) * …
    """
    count, slots = ids.shape
    allowed = sorted({slots, *(min(width, slots) for width in buckets)})
    lengths, drawn = ids.argmax(axis=-1) + 1, np.arange(min(batch_size, count))
    fitting = [np.sum(lengths <= width) for width in allowed]
    chances = [np.prod(np.maximum(n - drawn, 0) / (count - drawn)) for n in fitting]
    shares = np.diff(chances, prepend=0.0)
    return tuple(width for width, share in zip(allowed, shares, strict=True) if share >= RARE)


class CaptionTokenizer:
    """Captions -> ids of a fixed number of slots; can be sent to worker processes.

    Raises:
        UserError: the model's vocabulary is of another tokenizer.
    """

    def __init__(self, slots: int, vocab_size: int = VOCAB_SIZE):
        if vocab_size != VOCAB_SIZE:
            raise UserError(
                f"a CLIP with a vocabulary of {vocab_size:,} tokens, which is of another tokenizer "
                f"than CLIP's own, of {VOCAB_SIZE:,}: it cannot be told what captions say"
            )
        self.slots = slots
        self._tokenizer = Tokenizer()

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """int32 [N, T]; a caption that is too long is cut, its EOT kept."""
        return self.with_cuts(captions)[0]

    def lengths(self, captions: Sequence[str]) -> np.ndarray:
        """int [N]: the slots that whole captions take, SOS and EOT among them."""
        return self._tokenizer.lengths(captions)

    def with_cuts(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(int32 [N, T], bool [N]: the caption was cut)."""
        return self._tokenizer(captions, self.slots)


class TokenizedCaptions:
    """Captions -> ids that were made before: drawing one, epoch after epoch, costs a lookup.

    Args:
        captions: N.
        ids: int32 [N, T], row i of caption i.
    """

    def __init__(self, captions: Sequence[str], ids: np.ndarray):
        self._ids = ids.astype(np.uint16)  # VOCAB_SIZE fits; they are kept, and sent to workers
        self._row_of = {caption: row for row, caption in enumerate(captions)}

    def __call__(self, captions: Sequence[str]) -> np.ndarray:
        """int32 [N, T]."""
        return self._ids[[self._row_of[caption] for caption in captions]].astype(np.int32)
