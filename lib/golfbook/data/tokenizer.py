"""SentencePiece tokenizers, and how many bytes of text each token stands for.

Bits per byte divides by bytes of text, so a wrong byte table is a wrong score. :class:`ByteTable` holds the table of
PR 1166 (section 3.4); nothing relies on it before :func:`audit_documents` has compared it with what the tokenizer
really decodes, document by document.
"""

from __future__ import annotations

import io
import itertools
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from golfbook.errors import ByteAccountingError, DataError
from golfbook.files import atomic_write_bytes, sha256_bytes

SPACE = "\u2581"  # what SentencePiece writes for a space
BATCH = 512  # documents encoded or decoded in one call
TRAINING_CHARACTERS = 20_000_000  # a tokenizer learns from so many at most: more change no merge that matters
LINE_CHARACTERS = 4096  # longer lines are learnt from in pieces of this length: the trainer limits the length of a word

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ByteTable:
    """Bytes of each token (PR 1166 section 3.4). All arrays have the length of the vocabulary.

    ``base`` int16: UTF-8 bytes without the leading space; ``leading_space`` bool: the piece begins with one;
    ``boundary`` bool: a leading space right after this token is swallowed by the decoder (BOS and its like).
    """

    base: Array
    leading_space: Array
    boundary: Array


class Tokenizer:
    """A SentencePiece model with the byte table of its vocabulary. Open one with :meth:`load`."""

    def __init__(self, model: bytes, path: Path) -> None:
        """Use :meth:`load`; ``model`` is the content of the ``.model`` file that messages call ``path``."""
        self.path = path
        self.sha256 = sha256_bytes(model)
        try:
            if not model:
                raise RuntimeError("the file is empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{path} is no SentencePiece model: {error}") from None
        self.vocab_size = int(self._processor.vocab_size())
        self.bos_id = int(self._processor.bos_id())
        self.unk_id = int(self._processor.unk_id())
        if not 0 < self.vocab_size <= 65536:
            raise DataError(
                f"{path}: {self.vocab_size} pieces; token shards hold 16-bit ids, so 1 to 65536 are possible"
            )
        if self.bos_id < 0:
            raise DataError(f"{path} has no BOS piece, which must come before every document; train it with bos_id=1")
        self.byte_table = self._build_table()
        largest = int(self.byte_table.base.max()) + 1
        self._count_dtype = np.dtype(np.uint8 if largest < 256 else np.int64)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Open a ``.model`` file. Raises :class:`DataError` when it is missing, damaged or unusable here."""
        path = Path(path)
        try:
            model = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read tokenizer {path}: {error.strerror}") from None
        return cls(model, path)

    def piece(self, token: int) -> str:
        """Return the piece of a token id as SentencePiece spells it: U+2581 for a space, ``<0x0A>`` for a byte."""
        return str(self._processor.id_to_piece(int(token)))

    def is_byte(self, token: int) -> bool:
        """Return whether a token is a byte-fallback piece."""
        return bool(self._processor.is_byte(int(token)))

    def encode(self, text: str) -> Array:
        """Encode ``text``: tokens, uint16 (n,), without BOS. Raises :class:`DataError` for text that is no Unicode."""
        return self.encode_batch([text])[0]

    def encode_document(self, text: str) -> Array:
        """Return BOS, then the tokens of ``text``: uint16 (n + 1,)."""
        return np.concatenate([np.array([self.bos_id], np.uint16), self.encode(text)])

    def encode_batch(self, texts: Sequence[str]) -> list[Array]:
        """Encode each text: tokens, uint16, without BOS; much faster than one call a text."""
        utf8 = [to_utf8(text) for text in texts]
        return [np.array(ids, dtype=np.uint16) for ids in self._processor.encode(utf8, out_type=int)]

    def decode(self, ids: Iterable[int] | Array) -> str:
        """Decode tokens. Control pieces such as BOS vanish; bytes that are no UTF-8 become U+FFFD, one a byte."""
        return self.decode_batch([ids])[0]

    def decode_batch(self, batch: Sequence[Iterable[int] | Array]) -> list[str]:
        """Return the text of each token sequence. Raises :class:`DataError` for an id outside the vocabulary."""
        lists = [[int(i) for i in ids] if not isinstance(ids, np.ndarray) else ids.tolist() for ids in batch]
        for ids in lists:
            if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
                raise DataError(
                    f"token id {max(ids)} is outside the vocabulary of {self.path} ({self.vocab_size} pieces)"
                )
        return [str(text) for text in self._processor.decode(lists)] if lists else []

    def decode_documents(self, tokens: Array, most: int | None = None) -> list[str]:
        """Return the text of the documents that BOS tokens begin in a stream, of the first ``most`` or all of them."""
        return self.decode_batch(np.split(tokens, np.flatnonzero(tokens == self.bos_id))[1:][:most])

    def differences(self, text: str, decoded: str) -> list[tuple[str, str]]:
        """List the pieces of ``text`` that differ in ``decoded``, which its tokens decode to; in order, no more.

        SentencePiece tells which characters each normalised one comes from. Where the decoder changes more than that
        (a denormaliser), everything between the first and the last difference is one piece.
        """
        normal, origin = self._processor.normalize(text, with_offsets=True)
        first = len(normal) - len(decoded)  # the decoder swallows a space that stands before the first word
        before, between, after = (_code_points(t) for t in (text, normal[first:] if first in (0, 1) else "", decoded))
        if len(between) != len(after) or not ((between == after) | (between == ord(SPACE))).all():
            return [_without_ends(text, decoded)] if text != decoded else []
        source = np.array(origin[first:])  # where in ``text`` each decoded character begins; the end of all of it
        # between two edges, one or several decoded characters come from one or several of the text
        edges = np.unique([0, *(np.flatnonzero(np.diff(source) > 0) + 1), len(decoded)])
        start, stop = edges[:-1], edges[1:]
        kept = (stop - start == 1) & (source[stop] - source[start] == 1)
        kept[kept] = before[source[start[kept]]] == after[start[kept]]
        pairs = [
            (text[: source[0]], ""),
            *((text[source[a] : source[b]], decoded[a:b]) for a, b in edges[np.flatnonzero(~kept)[:, None] + [0, 1]]),
            (text[source[-1] :], ""),
        ]
        return [_without_ends(a, b) for a, b in pairs if a != b]

    def token_bytes(self, tokens: Array) -> Array:
        """Count the bytes of the targets ``tokens[1:]`` given those before, ``tokens[:-1]``: (n,) for n + 1 tokens.

        The leading space of a piece counts, except after a boundary token (PR 1166 section 3.5). dtype uint8, or int64
        for vocabularies with pieces of 255 bytes and more. Raises :class:`DataError` for ids outside the vocabulary.
        """
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            raise DataError(
                f"token id {int(tokens.max())} is outside the vocabulary of {self.path} ({self.vocab_size})"
            )
        table, previous, target = self.byte_table, tokens[:-1], tokens[1:]
        count = table.base.astype(self._count_dtype)[target]
        count += table.leading_space[target] & ~table.boundary[previous]
        return count

    def _build_table(self) -> ByteTable:
        processor, n = self._processor, self.vocab_size
        base, space = np.zeros(n, np.int16), np.zeros(n, bool)
        boundary = np.ones(n, bool)
        for i in range(n):
            if processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i):
                continue
            boundary[i] = False
            if processor.is_byte(i):
                base[i] = 1
                continue
            piece = self.piece(i)
            space[i] = piece.startswith(SPACE)
            # every U+2581 decodes to one space, so a piece with inner ones is shorter than its own UTF-8
            base[i] = len(piece[1:].replace(SPACE, " ").encode() if space[i] else piece.replace(SPACE, " ").encode())
        first = np.flatnonzero(space)
        # A model without dummy prefix and whitespace removal keeps the space a document begins with: no boundary then.
        probe = next((int(i) for i in first if base[i] > 0), None)
        if probe is not None and len(self.decode([self.bos_id, probe]).encode()) > base[probe]:
            boundary[:] = False
        return ByteTable(base, space, boundary)


def to_utf8(text: str) -> bytes:
    """Encode ``text`` in UTF-8; raises :class:`DataError` where it holds lone surrogates, which have none."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text is no valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
            "repair it, for example with text.encode('utf-8', 'replace').decode()"
        ) from None


def _code_points(text: str) -> Array:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _without_ends(a: str, b: str) -> tuple[str, str]:
    """Return two texts without the characters that they begin and end with alike."""

    def alike(a: Iterable[str], b: Iterable[str]) -> int:
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))

    start = alike(a, b)
    a, b = a[start:], b[start:]
    stop = alike(reversed(a), reversed(b))
    return a[: len(a) - stop], b[: len(b) - stop]


@dataclass(frozen=True)
class Audit:
    """Result of encoding documents with every byte accounted for."""

    tokens: Array  # uint16 (n,): BOS and tokens of each document, one after the other
    lengths: Array  # int64 (documents,): tokens of each document, its BOS included
    original_bytes: Array  # int64 (documents,): UTF-8 bytes of each document as it was given
    decoded_bytes: Array  # int64 (documents,): UTF-8 bytes of each document as its tokens decode
    changed_characters: Array  # int64 (documents,): characters that decode to something else, or to nothing
    examples: list[str]  # of each document: the change that occurs most often, such as "'A' became 'a'"; "" without


def audit_documents(tokenizer: Tokenizer, documents: Sequence[str], split: str) -> Audit:
    """Encode documents, each after BOS, and check that table bytes equal decoded bytes in every one of them.

    Raises :class:`ByteAccountingError` naming ``split``, the document and the first token that does not fit.
    """
    parts: list[Array] = []
    lengths = np.zeros(len(documents), np.int64)
    original, decoded = np.zeros_like(lengths), np.zeros_like(lengths)
    changed, examples = np.zeros_like(lengths), [""] * len(documents)
    bos = np.array([tokenizer.bos_id], np.uint16)
    for start in range(0, len(documents), BATCH):
        texts = documents[start : start + BATCH]
        encoded = [np.concatenate([bos, ids]) for ids in tokenizer.encode_batch(texts)]
        back = check_documents(tokenizer, encoded, split, start, texts)
        for i, (text, ids, again) in enumerate(zip(texts, encoded, back, strict=True), start):
            lengths[i], original[i], decoded[i] = ids.size, len(text.encode()), len(again.encode())
            if text != again:
                pairs = tokenizer.differences(text, again)
                changed[i] = sum(max(len(a), 1) for a, _ in pairs)  # what was put in between counts as one
                examples[i] = _example(*Counter(pairs).most_common(1)[0][0])
        parts += encoded
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.uint16)
    return Audit(tokens, lengths, original, decoded, changed, examples)


def describe_changes(changed_characters: Array, examples: Sequence[str]) -> str:
    """Say what a tokenizer changed in documents, in words: how much, in how many of them, and an example."""
    count, documents = int((changed_characters > 0).sum()), len(changed_characters)
    if not count:
        return f"nothing; each of {documents:,} documents decodes to what it was"
    return (
        f"{int(changed_characters.sum()):,} characters in {count:,} of {documents:,} documents decode to something "
        f"else, for example {examples[int(changed_characters.argmax())]}"
    )


def _example(a: str, b: str, most: int = 20) -> str:
    a, b = (text if len(text) <= most else text[:most] + "…" for text in (a, b))
    alike = unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b)  # to the eye
    spell = ascii if alike else repr
    return f"{spell(a) if a else 'nothing'} became {spell(b) if b else 'nothing'}"


def check_documents(
    tokenizer: Tokenizer, encoded: Sequence[Array], split: str, start: int = 0, originals: Sequence[str] | None = None
) -> list[str]:
    """Decode documents given as tokens from BOS on, and compare their bytes with the table's.

    Returns the decoded texts. Raises :class:`ByteAccountingError` naming the document and the cause; ``start`` is the
    number of the first document, ``originals`` what the tokens were made of, where that is known.
    """
    texts = tokenizer.decode_batch(encoded)
    for i, (ids, text) in enumerate(zip(encoded, texts, strict=True)):
        table, real = int(tokenizer.token_bytes(ids).sum(dtype=np.int64)), len(text.encode())
        if table != real:
            original = originals[i] if originals is not None else None
            words = " ".join((original or text)[:200].split())[:60]
            cause, advice = _cause(tokenizer, ids, original)
            raise ByteAccountingError(
                f"{split} document {start + i}, which begins {words!r}: the byte table of {tokenizer.path} gives "
                f"{table} bytes, its tokens decode to {real} bytes{cause}. Bits per byte would be wrong, so nothing is "
                f"scored: {advice}"
            )
    return texts


def _cause(tokenizer: Tokenizer, ids: Array, original: str | None) -> tuple[str, str]:
    """Say why the bytes of a document do not add up, and what to do about it."""
    train = "or leave data.tokenizer empty to train one"
    for position in np.flatnonzero(ids == tokenizer.unk_id)[:1]:
        lacking = [c for c in dict.fromkeys(original or "") if tokenizer.unk_id in tokenizer.encode(c)]
        what = f"{lacking[0]!r} (U+{ord(lacking[0]):04X})" if lacking else "a character"
        token = f"token {position}, id {tokenizer.unk_id} '{tokenizer.piece(tokenizer.unk_id)}'"
        return f"; {token}, stands for {what}, which has no piece", f"use a tokenizer with byte fallback, {train}"
    known = [not tokenizer.is_byte(token) for token in ids.tolist()]
    for plain, run in itertools.groupby(range(len(ids)), known.__getitem__):
        places = list(run)
        spelt = b"" if plain else bytes(int(tokenizer.piece(ids[i])[3:5], 16) for i in places)  # of <0xE2>
        try:
            spelt.decode()
        except UnicodeDecodeError as error:
            part = spelt[error.start : error.end].hex(" ")
            what = f"; from token {places[error.start]} on it has the bytes {part}, no whole character"
            return f"{what}: the document was cut inside one", "cut between characters when you write the shards"
    return _culprit(tokenizer, ids), f"use another tokenizer, {train}"


def _culprit(tokenizer: Tokenizer, ids: Array) -> str:
    """Name the first token whose decoded length, between two ordinary pieces, is not the table's."""
    table = tokenizer.byte_table
    plain = [i for i in ids.tolist() if table.base[i] > 0 and not tokenizer.is_byte(i)]
    if not plain:
        return ""
    anchor = plain[0]
    alone = len(tokenizer.decode([anchor, anchor]).encode())
    for position, token in enumerate(ids.tolist()):
        if tokenizer.is_byte(token) or token == tokenizer.bos_id:
            continue
        added = len(tokenizer.decode([anchor, token, anchor]).encode()) - alone
        expected = int(table.base[token]) + int(table.leading_space[token])
        if added != expected:
            return (
                f"; token {position}, id {token} '{tokenizer.piece(token)}', has {added} bytes, in the table {expected}"
            )
    return ""


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, destination: str | Path, *, dummy_prefix: bool = False
) -> Path:
    """Train a SentencePiece BPE model on ``documents`` and write it to ``destination``; the same input, the same file.

    Byte fallback, no normalisation, no whitespace removal: every text decodes to itself (U+2581 apart, which
    SentencePiece reads as a space). Line ends are byte pieces. pad, bos, eos, unk are 0, 1, 2, 3, as in the challenge.
    ``dummy_prefix`` is SentencePiece's own default: a space is put before each document, and decoding swallows it.
    Raises :class:`DataError` when the documents are too few for ``vocab_size``, or ``vocab_size`` too small.
    """
    model = io.BytesIO()
    lines = _lines(documents)
    first = next(lines, None)
    if first is None:
        raise DataError("there is no text to train a tokenizer on; check data.path")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=dummy_prefix,
            allow_whitespace_only_pieces=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            num_threads=1,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            max_sentence_length=8 * LINE_CHARACTERS,
            minloglevel=2,
        )
    except RuntimeError as error:
        if "too high" in str(error):
            most = str(error).rpartition("<=")[2].strip(" .\n")
            raise DataError(
                f"the training documents are too small for a vocabulary of {vocab_size} pieces (at most {most}): give "
                "more text, set model.vocab_size lower, or name an existing .model in data.tokenizer"
            ) from None
        if "smaller than required_chars" in str(error):
            least = str(error).partition(" vs ")[2].split(".")[0]
            raise DataError(
                f"a vocabulary of {vocab_size} pieces has no room for 256 bytes, 4 control pieces and the characters "
                f"of these documents: set model.vocab_size to {least} or more"
            ) from None
        raise DataError(f"SentencePiece could not train a tokenizer: {error}") from None
    destination = Path(destination)
    atomic_write_bytes(destination, model.getvalue())
    return destination


def _lines(documents: Iterable[str]) -> Iterator[str]:
    left = TRAINING_CHARACTERS
    for document in documents:
        for line in document.splitlines():
            for start in range(0, len(line), LINE_CHARACTERS):
                yield line[start : start + LINE_CHARACTERS]
        left -= len(document)
        if left <= 0:
            return
