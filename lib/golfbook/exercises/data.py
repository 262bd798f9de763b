"""Exercises of 01: counting bytes, an honest unigram, and pair counts."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from golfbook.analysis.counts import frequencies
from golfbook.data.dataset import unigram_bits_per_byte
from golfbook.data.tokenizer import SPACE, Tokenizer, train_tokenizer
from golfbook.evaluate.scoring import bits_per_byte
from golfbook.exercises.check import Misconception, compare

Array = np.ndarray[Any, Any]
LETTERS = "aeioustrnéü"


def byte_counter(answer: Callable[[str, str, set[str]], int]) -> str:
    """Judge ``answer(previous, piece, boundaries)`` by ``Tokenizer.token_bytes``, on documents and two tokenizers."""
    luck = np.random.default_rng()
    documents = [_document(luck) for _ in range(12)]
    for swallows in (False, True):  # as the workbook's own tokenizers decode, and by SentencePiece's default
        with tempfile.TemporaryDirectory() as folder:
            path = train_tokenizer(documents, 320, Path(folder) / "invented.model", dummy_prefix=swallows)
            tokenizer = Tokenizer.load(path)
        ids = np.concatenate([tokenizer.encode_document(text) for text in documents])
        pieces = [tokenizer.piece(token) for token in ids]
        boundaries = {tokenizer.piece(token) for token in np.flatnonzero(tokenizer.byte_table.boundary).tolist()}
        given = [int(answer(a, b, set(boundaries))) for a, b in itertools.pairwise(pieces)]
        rows = zip(itertools.pairwise(pieces), given, tokenizer.token_bytes(ids).tolist(), strict=True)
        wrong = [(a, b, got, right) for (a, b), got, right in rows if got != right]
        if wrong:
            raise Misconception(_why_not_bytes(wrong, boundaries))
    return "Tokenizer.token_bytes counts the same for both kinds of tokenizer"


def _why_not_bytes(wrong: list[tuple[str, str, int, int]], boundaries: set[str]) -> str:
    for before, piece, given, right in wrong:
        spelt = given == len(piece.encode()) and piece not in ("<s>", "</s>")
        if spelt and piece.startswith((SPACE, "<0x")):
            return f"{piece!r} is a spelling: the space mark has three bytes, <0x0A> has six, and the text has not"
        if given == len(piece) != right and not piece.startswith((SPACE, "<")):
            return f"{piece!r} has {given} characters; the text is counted in bytes of UTF-8"
        if before in boundaries and given == right + 1:
            return f"the space of {piece!r} is counted after {before!r}, though the decoder swallows it there"
    before, piece, given, right = wrong[0]
    if piece.startswith(SPACE) and given == right - 1:
        return f"the leading space of {piece!r} after {before!r} is a byte of the text, and it is not counted"
    if piece == "<s>":
        return "BOS stands between documents and for no text of them"
    return f"{piece!r} after {before!r} does not have {given} bytes"


def _document(luck: np.random.Generator) -> str:
    words = ["".join(luck.choice(list(LETTERS), luck.integers(1, 7))) for _ in range(30)]
    odd = luck.permutation(["🚀", "\n", "naïve", "日本", "  ", "\t"])
    return " ".join([*words[:10], *odd, *words[10:]])


def honest_unigram(answer: Callable[[Array, Array, int, int], float]) -> str:
    """Judge ``answer(training, scored, pieces, size)``: bits per byte of ``scored`` by add-one training frequencies.

    Between the entropy of the scored text, which no frequencies beat, and a uniform guess, which the exact cases pin.
    """
    luck = np.random.default_rng()
    pieces = int(luck.integers(20, 60))
    shape = luck.dirichlet(np.full(pieces, 0.5))
    training, scored = (luck.choice(pieces - 1, n, p=shape[1:] / shape[1:].sum()) for n in (3000, 400))
    scored[luck.integers(1, len(scored), 3)] = pieces - 1  # a piece that training never saw
    size = 2 * len(scored)
    targets = len(scored) - 1
    least, uniform = unigram_bits_per_byte(scored, size), np.log2(pieces) * targets / size
    with np.errstate(divide="ignore", invalid="ignore"):
        given = float(answer(training.copy(), scored.copy(), pieces, size))
        level = float(answer(np.tile(np.arange(pieces), 200), scored.copy(), pieces, size))
    if not np.isfinite(given):
        raise Misconception("a piece that training never saw gets probability 0, and its loss has no end")
    for counted, added in itertools.product((scored, scored[1:]), (0, 1)):
        share = np.bincount(counted, minlength=pieces) + added
        if np.isclose(given, bits_per_byte(-np.log((share / share.sum())[scored[1:]]), size)):
            raise Misconception("the frequencies were counted in the scored text itself, which is to be a surprise")
    per_token = size / targets
    units = {"in nats": np.log(2), "per token": per_token, "the sum": size, "per token, in nats": per_token * np.log(2)}
    words = "; the score is in bits per byte of the scored text"
    mistakes = {f"that is {unit}{words}": factor * uniform for unit, factor in units.items()}
    otherwise = "where training has all pieces equally often, it must be as dear as a uniform guess"
    compare(level, uniform, otherwise, mistakes, rtol=1e-3)
    if given < least:
        raise Misconception("it lies below the entropy of the scored text, which no fixed frequencies can beat")
    right = bits_per_byte(-np.log(frequencies(training, pieces)[scored[1:]]), size)
    otherwise = "it differs from counts.frequencies: add one to every count, then divide by the new sum"
    compare(given, right, otherwise, rtol=0.01)
    return f"{given:.3f} lies above the {least:.3f} of frequencies that know the text, and below a uniform guess"


def pair_counts(answer: Callable[[Array, int], Array]) -> str:
    """Judge ``answer(training, pieces)``, a matrix P[a, b], the probability of b after a, on an invented language."""
    luck = np.random.default_rng()
    pieces = int(luck.integers(12, 30))
    language = luck.dirichlet(np.full(pieces, 0.2), size=pieces)
    language[:, -1] = 0  # the last piece is never written
    language /= language.sum(axis=1, keepdims=True)
    training, scored = (_write(language, n, luck) for n in (6000, 1500))
    with np.errstate(divide="ignore", invalid="ignore"):
        table = np.asarray(answer(training.copy(), pieces), float)
    if table.shape != (pieces, pieces):
        raise Misconception(f"it has shape {table.shape}; a row and a column for each of the pieces are asked for")
    if not np.isfinite(table).all():
        raise Misconception("a row without any pair became 0/0: what follows a piece that training never saw?")
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    if not np.allclose(rows, 1):
        if np.allclose(columns[columns > 0], 1):
            raise Misconception("the columns add up to 1; that says what stood before b, and not what follows a")
        if np.isclose(table.sum(), 1):
            raise Misconception("the whole matrix adds up to 1; each row must, as b is drawn when a is known")
        raise Misconception(f"row sums lie between {rows.min():.3g} and {rows.max():.3g}; each must be 1")
    if (table <= 0).any():
        raise Misconception("a pair that training never saw is impossible there; the first in the text has no end")
    cost = bits_per_byte(-np.log(table[scored[:-1], scored[1:]]), len(scored))
    unigram = unigram_bits_per_byte(scored, len(scored))
    if bits_per_byte(-np.log(table[scored[1:], scored[:-1]]), len(scored)) < min(cost, unigram):
        raise Misconception("rows and columns are exchanged: it gives the piece before, and not the one after")
    if cost >= unigram:
        raise Misconception(f"pairs cost {cost:.3f} bits and frequencies alone {unigram:.3f}; do they count pairs?")
    return f"rows add up to 1, nothing is impossible, and {cost:.2f} bits lie below the {unigram:.2f} of frequencies"


def _write(language: Array, length: int, luck: np.random.Generator) -> Array:
    text = [0]
    for _ in range(length - 1):
        text.append(int(luck.choice(len(language), p=language[text[-1]])))
    return np.array(text)


EXERCISES: dict[str, Callable[[Any], str]] = {"01.1": byte_counter, "01.2": honest_unigram, "01.3": pair_counts}
