"""Coders: exact round trips of every kind of tensor, and what the entropy coder promises of size and cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golfbook.compress.coders import Entry, entry_of, pack
from golfbook.compress.contexts import CLASSES, fit, prior
from golfbook.compress.counts import MOST, TOTAL, VALUES_PER_BYTE, Reader, Table, Writer, frequencies
from golfbook.compress.entropy import ENTROPY, described
from golfbook.compress.estimates import cross_entropy_bits, estimate_bits
from golfbook.compress.quantizer import QuantizedTensor
from golfbook.compress.trellis import points, transitions
from golfbook.config.tables import CODERS, named

GOLDEN = Path(__file__).parent / "golden" / "entropy_stream.bin"
FIELDS = ("q", "scale", "rows", "columns", "value")


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Whether two tensors hold the same bits."""
    for field in FIELDS:
        x, y = getattr(a, field), getattr(b, field)
        if (x is None) != (y is None) or (x is not None and (x.dtype != y.dtype or x.shape != y.shape)):
            return False
        if x is not None and x.numpy().tobytes() != y.numpy().tobytes():
            return False
    return (a.name, a.kind, a.bits, a.states) == (b.name, b.kind, b.bits, b.states)


def gaussian(rows: int, columns: int, states: int = 1, deviation: float = 3.0, seed: int = 0) -> QuantizedTensor:
    """Integers whose deviation varies by row and column, as kind "step" without logs."""
    rng = np.random.default_rng(seed)
    spread = np.exp(0.2 * rng.standard_normal((rows, 1)) + 0.3 * rng.standard_normal((1, columns)))
    q = np.rint(deviation * spread * rng.standard_normal((rows, columns))).astype(np.int16)
    scale = torch.tensor(0.01).half()
    return QuantizedTensor(f"g{seed}", "step", 0, q=torch.from_numpy(q), scale=scale, states=states)


@st.composite
def tensors(draw) -> QuantizedTensor:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["int", "step", "float16", "float32"]))
    shape = draw(st.sampled_from([(1, 1), (1, 9), (9, 1), (2, 3), (40, 30), (7, 130)]))
    size = draw(st.sampled_from(["zeros", "ones", "small", "sparse", "alike", "extreme"]))
    limit = 2**15 if kind == "step" else 31
    if kind in ("float16", "float32"):
        shape = draw(st.sampled_from([(), (1,), (130,), (2, 3, 4), shape]))
        value = torch.tensor(rng.standard_normal(shape) * (size != "zeros"), dtype=torch.float32)
        dtype = torch.float16 if kind == "float16" else torch.float32
        return QuantizedTensor("x", kind, 16 if kind == "float16" else 32, value=value.to(dtype))
    q = {
        "zeros": lambda: np.zeros(shape),
        "ones": lambda: np.full(shape, limit - 1),
        "small": lambda: np.clip(np.rint(4 * rng.standard_normal(shape)), 1 - limit, limit - 1),
        "sparse": lambda: (limit - 1) * (rng.random(shape) < 0.02),
        "alike": lambda: np.clip(
            np.rint(9 * rng.standard_normal(shape[1])) + 0 * np.zeros(shape), 1 - limit, limit - 1
        ),
        "extreme": lambda: rng.integers(-limit if kind == "step" else 1 - limit, limit, shape),
    }[size]()
    if kind == "int":
        plain = draw(st.booleans())
        scale = torch.rand(()) if plain else torch.rand(shape[0]).half()
        return QuantizedTensor("x", "int", 6, q=torch.from_numpy(q.astype(np.int8)), scale=scale)
    logs = [torch.from_numpy(rng.integers(0, draw(st.sampled_from([1, 4, 256])), n).astype(np.uint8)) for n in shape]
    rows, columns = (log if draw(st.booleans()) else None for log in logs)
    states = draw(st.sampled_from([1, 4, 8, 16, 32, 64, 128, 256]))
    scale = torch.tensor(0.25).half()
    q = torch.from_numpy(q.astype(np.int16))
    return QuantizedTensor("x", "step", 0, q=q, scale=scale, rows=rows, columns=columns, states=states)


@pytest.mark.parametrize("coder", CODERS)
@given(drawn=st.lists(tensors(), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_every_tensor_comes_back(coder, drawn):
    given = [replace(tensor, name=f"t{i}") for i, tensor in enumerate(drawn)]
    found = named(CODERS, coder)
    stream = found.encode(given, 6)
    decoded = found.decode(memoryview(stream), [entry_of(tensor) for tensor in given])
    assert list(decoded) == [tensor.name for tensor in given]
    assert all(same(tensor, decoded[tensor.name]) for tensor in given)
    assert found.encode(given, 6) == stream


def test_wide_integers_are_packed_in_planes():
    tensor = QuantizedTensor("x", "step", 0, q=torch.tensor([[1, -2], [256, 515]], dtype=torch.int16),
                             scale=torch.tensor(1.0).half(), rows=torch.tensor([7, 8], dtype=torch.uint8))  # fmt: skip
    assert b"".join(pack([tensor])) == bytes([1, 254, 0, 3, 0, 0, 1, 2]) + b"\x00\x3c" + bytes([7, 8])
    assert entry_of(tensor) == Entry("x", "t1r", (2, 2))


@pytest.mark.parametrize("states", [1, 8])
def test_coded_bytes_are_the_cross_entropy_and_the_estimate(states):
    given = [gaussian(200, 150, states, 3.0, seed=1), gaussian(64, 300, states, 1.2, seed=2)]
    bits = 8 * len(ENTROPY.encode(given, 0))
    assert cross_entropy_bits(given) == pytest.approx(bits, rel=0.005)
    estimate = estimate_bits(given)
    assert sum(estimate.values()) == pytest.approx(bits, rel=0.005)
    for tensor in given:  # the share of each is near what it costs alone, and less: it need not learn all by itself
        alone = sum(estimate_bits([tensor]).values())
        assert 0.97 * alone < estimate[tensor.name] < 1.001 * alone


def test_coded_bytes_are_near_the_entropy_of_the_source():
    """Gaussians of known deviations: within 1 % of what an ideal coder that knows all of them would spend."""
    rng = np.random.default_rng(5)
    spread = 4 * np.exp(0.5 * rng.standard_normal((256, 1)))
    q = torch.from_numpy(np.rint(spread * rng.standard_normal((256, 512))).astype(np.int16))
    tensor = replace(gaussian(1, 1), q=q)
    ideal = (np.log2(spread * np.sqrt(2 * np.pi * np.e)) * 512).sum() / 8
    assert ideal < len(ENTROPY.encode([tensor], 0)) < 1.01 * ideal


def test_classes_pay_for_themselves():
    """A deviation that varies by row and column is found; where it does not vary, one class serves."""
    flat = torch.from_numpy(np.rint(4 * np.random.default_rng(0).standard_normal((60, 60))).astype(np.int16)).numpy()
    a, b, _ = fit((2.0 * flat) ** 2)
    assert np.ptp(a) == np.ptp(b) == 0 and a[0] == 12 + 8, "2^-3 * 2^(20 / 4) = 4"
    q = gaussian(300, 300).q.numpy()
    a, b, bits = fit((2.0 * q) ** 2)
    assert np.ptp(a) > 4 and b.min() < -1 and b.max() > 1
    assert bits < fit((2.0 * np.random.default_rng(1).permutation(q.ravel()).reshape(q.shape)) ** 2)[2] * 0.99


def test_rows_alike_are_sent_as_differences():
    rng = np.random.default_rng(0)
    q = np.rint(40 * rng.standard_normal((100, 64))).astype(np.int8)
    q[20:60] = np.clip(q[20] + rng.integers(-1, 2, (40, 64)), -127, 127)
    sent, alike, _, _ = described(q, 1)
    assert np.flatnonzero(alike).tolist() == list(range(20, 60))
    np.testing.assert_array_equal(np.cumsum(sent[alike], axis=0), q[alike])
    tensor = QuantizedTensor("x", "int", 8, q=torch.from_numpy(q.clip(-127, 127)), scale=torch.ones(100).half())
    assert not described(q, 8)[1].any()
    shuffled = replace(tensor, q=torch.from_numpy(rng.permuted(tensor.q.numpy(), axis=1)))
    assert len(ENTROPY.encode([tensor], 0)) < 0.8 * len(ENTROPY.encode([shuffled], 0))


def test_no_symbol_is_free():
    """Whatever a table has seen: positive frequencies of the right sum, none above 2^(-1/64)."""
    assert MOST / TOTAL < 2 ** (-1 / 64)
    for counts in ([1, 0], [10**9, 1, 1], [0, 0, 5, 10**12], [1] * 700, [3] + [0] * 500):
        found = frequencies(np.array(counts, np.int64))
        assert found.sum() == TOTAL and found.min() >= 1 and found.max() <= MOST
    for size in (2, 3, 40, 800):
        table = Table(np.ones(size, np.int64))
        table.add(np.zeros(table.left, np.int32))
        writer = Writer()
        writer.code(table, np.zeros(200_000, np.int32), 200_000)
        assert len(writer.data()) * VALUES_PER_BYTE >= 200_000
    zeros = replace(gaussian(1, 1), q=torch.zeros((1000, 1000), dtype=torch.int16))
    assert len(ENTROPY.encode([zeros], 0)) * VALUES_PER_BYTE >= zeros.q.numel()


@given(seed=st.integers(0, 2**32), size=st.integers(2, 300))
@settings(max_examples=60, deadline=None)
def test_frequencies_are_dyadic_and_tables_agree(seed, size):
    """What the range coder is given is exact: in any order of computing; a reader's table is a writer's."""
    rng = np.random.default_rng(seed)
    table = Table(rng.integers(1, 500, size))
    quotients = table.frequencies / TOTAL
    np.testing.assert_array_equal(quotients, np.array([float(f) * 2.0**-20 for f in table.frequencies.tolist()]))
    np.testing.assert_array_equal(np.cumsum(quotients) * TOTAL, np.cumsum(table.frequencies))
    assert quotients.sum() == 1.0 == quotients[::-1].sum()
    symbols = rng.integers(0, size, 1000).astype(np.int32)
    writer, other = Writer(), Table(table.counts)
    writer.code(table, symbols, len(symbols))
    np.testing.assert_array_equal(Reader(memoryview(writer.data())).code(other, None, len(symbols)), symbols)
    np.testing.assert_array_equal(other.counts, table.counts)


def test_priors_are_symmetric_and_of_their_class():
    for context in range(0, 2 * CLASSES, 7):
        counts = prior(context)
        assert counts.min() >= 1
        np.testing.assert_array_equal(counts[:-1], counts[-2::-1])
    counts, k = prior(2 * 20)[:-1], np.arange(len(prior(2 * 20)) - 1) - len(prior(2 * 20)) // 2 + 1
    assert np.sqrt((counts * k**2).sum() / counts.sum()) == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("states", [4, 8, 256])
def test_points_are_a_walk(states):
    q = torch.randint(-300, 300, (5, 40), dtype=torch.int16)
    found, table = points(q, states), transitions(states)
    for row, values in zip(q.tolist(), found.tolist(), strict=True):
        state = 0
        for integer, point in zip(row, values, strict=True):
            assert point == 2 * integer + state % 2
            state = int(table[state, integer % 2])


def golden_tensors() -> list[QuantizedTensor]:
    """Tensors of all kinds, made by whole numbers alone."""

    def numbers(count: int, start: int) -> np.ndarray:
        x = start
        out = []
        for _ in range(count):
            x = (1103515245 * x + 12345) % 2**31
            out.append((x >> 16) % 64)
        return np.array(out)

    rough = (numbers(1200, 1) + numbers(1200, 2) - numbers(1200, 3) - numbers(1200, 4)).reshape(30, 40)
    q, logs = torch.from_numpy((rough // 8).astype(np.int16)), torch.from_numpy(numbers(70, 5).astype(np.uint8))
    half = torch.from_numpy(numbers(50, 6).astype(np.float16) / np.float16(64))
    step = QuantizedTensor("a", "step", 0, q=q, scale=half[3].clone(), rows=logs[:30], columns=logs[30:], states=8)
    return [
        step,
        replace(step, name="b", q=q * 700, rows=None, states=1),
        QuantizedTensor("c", "int", 8, q=torch.from_numpy((rough // 2).astype(np.int8)), scale=half[:30].clone()),
        QuantizedTensor("d", "float16", 16, value=half),
        QuantizedTensor("e", "float32", 32, value=half.float() / 3),
    ]


def test_golden_stream():
    """A stream written elsewhere decodes here to the same tensors, and is written here to the byte."""
    given, stream = golden_tensors(), GOLDEN.read_bytes()
    decoded = ENTROPY.decode(memoryview(stream), [entry_of(tensor) for tensor in given])
    assert all(same(tensor, decoded[tensor.name]) for tensor in given)
    assert ENTROPY.encode(given, 0) == stream
