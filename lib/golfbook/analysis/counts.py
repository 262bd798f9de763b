"""Models that only count: how often a piece occurs, and what follows what. They are the rungs below a trained model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from golfbook.data.dataset import unigram_bits_per_byte
from golfbook.data.tokenizer import Tokenizer, train_tokenizer
from golfbook.evaluate.scoring import bits_per_byte

Array = np.ndarray[Any, Any]
PRIOR = 10.0  # pairs invented for each predecessor, so that what was never seen keeps a probability


def frequencies(tokens: Array, pieces: int) -> Array:
    """Return the share of each of ``pieces`` ids among the targets ``tokens[1:]``, (pieces,) float64.

    One is added to every count, so that a piece that does not occur keeps a probability.
    """
    counts = np.bincount(tokens[1:], minlength=pieces) + 1.0
    return counts / counts.sum()


class Pairs:
    """Count what follows each token: pairs in ``tokens``, and ``PRIOR`` pairs more, spread like the frequencies."""

    def __init__(self, tokens: Array, pieces: int) -> None:
        ones = np.ones(len(tokens) - 1)
        self.counts = sparse.coo_array((ones, (tokens[:-1], tokens[1:])), shape=(pieces, pieces)).tocsr()
        self.total = self.counts.sum(axis=1) + PRIOR
        self.share = frequencies(tokens, pieces)

    def after(self, token: int) -> Array:
        """Return the probability of every piece after ``token``, (pieces,) float64; they add up to one."""
        start, stop = self.counts.indptr[token : token + 2]
        expected = PRIOR * self.share
        expected[self.counts.indices[start:stop]] += self.counts.data[start:stop]
        return np.asarray(expected / self.total[token])

    def bits_per_byte(self, tokens: Array, total_bytes: int) -> float:
        """Return what the targets ``tokens[1:]`` of a text of ``total_bytes`` cost, each given its predecessor."""
        before, after = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
        seen = np.asarray(self.counts[before, after]).ravel()
        return bits_per_byte(-np.log((seen + PRIOR * self.share[after]) / self.total[before]), total_bytes)


def vocabularies(training: Sequence[str], validation: Sequence[str], sizes: Sequence[int]) -> pd.DataFrame:
    """Return a row for each vocabulary size: a tokenizer learnt from ``training`` cuts ``validation``.

    Columns: ``pieces``, ``bits_per_token`` and ``bits_per_byte`` (unigram entropy), ``bytes_per_token``. Raises
    :class:`golfbook.errors.DataError` where ``training`` is too small for a size.
    """
    size = sum(len(text.encode()) for text in validation)
    rows = []
    for pieces in sizes:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = Tokenizer.load(train_tokenizer(training, pieces, Path(folder) / "other.model"))
        tokens = np.concatenate([tokenizer.encode_document(text) for text in validation])
        targets, bpb = len(tokens) - 1, unigram_bits_per_byte(tokens, size)
        rows.append((pieces, bpb * size / targets, bpb, size / targets))
    return pd.DataFrame(rows, columns=["pieces", "bits_per_token", "bits_per_byte", "bytes_per_token"])
