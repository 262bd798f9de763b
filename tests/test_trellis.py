"""The trellis and its search: against all walks of short rows, its gains in coded bits, feedback and prices."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from golfbook.compress import gptq, viterbi
from golfbook.compress.coders import entry_of
from golfbook.compress.entropy import ENTROPY
from golfbook.compress.estimates import cross_entropy_bits
from golfbook.compress.quantizer import QuantizedTensor
from golfbook.compress.rate_distortion import SLOPE
from golfbook.compress.trellis import POLYNOMIALS, points, transitions
from golfbook.compress.viterbi import Prices, predecessors, prices, search
from golfbook.plain import trellis as plain

STATES = [1, *POLYNOMIALS]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def drawn(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def stored(q: Tensor, states: int, step: float = 1.0) -> QuantizedTensor:
    return QuantizedTensor("w", "step", 0, q=q, scale=torch.tensor(step).half(), states=states)


def gram(columns: int, seed: int = 0) -> Tensor:
    """Inputs that hang together, of very different sizes."""
    x = drawn(4 * columns, columns, seed) @ drawn(columns, columns, seed + 1) / math.sqrt(columns)
    x = x * torch.rand(columns, generator=torch.Generator().manual_seed(seed)) ** 2
    return x.T @ x / len(x)


# -- the code ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", STATES)
def test_walks_are_those_of_the_formula(states: int) -> None:
    q = torch.randint(-30, 30, (5, 70), generator=torch.Generator().manual_seed(states), dtype=torch.int16)
    assert points(q, states).tolist() == [plain.decode(row, states) for row in q.tolist()]
    assert points(q, states).dtype == torch.int32


@pytest.mark.parametrize("states", STATES)
def test_what_is_found_comes_back_through_the_coder(states: int) -> None:
    weight = drawn(9, 130)
    tensor = stored(search(weight, torch.tensor([[0.375]]), states), states, 0.375)
    (back,) = ENTROPY.decode(memoryview(ENTROPY.encode([tensor], 0)), [entry_of(tensor)]).values()
    assert back.states == states and torch.equal(back.q, tensor.q)
    expected = torch.tensor([plain.decode(row, states) for row in tensor.q.tolist()]) * 0.375 / 2
    assert torch.equal(back.dequantize(), expected)
    assert (weight - expected).abs().max() < 0.75


@pytest.mark.parametrize("states", POLYNOMIALS)
def test_two_edges_lead_to_each_state(states: int) -> None:
    following = transitions(states).flatten()
    for state, edges in enumerate(predecessors(states)):
        assert following[edges].tolist() == [state, state] and edges[0] != edges[1]


# -- the search --------------------------------------------------------------------------------------------------------


@given(
    columns=st.integers(1, 6), states=st.sampled_from([4, 8]), even=st.booleans(), rate=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_search_is_the_best_of_all_walks(columns: int, states: int, even: bool, rate: float, seed: int) -> None:
    """Also where columns have steps of their own, and with prices, for which an edge still takes its nearest point."""
    weight = drawn(2, columns, seed)
    steps = torch.full((1, columns), 0.9) if even else 0.5 + torch.rand(1, columns)
    fees = prices((3 * drawn(2, columns, seed + 1)).round().short(), states) if rate else None
    found = search(weight, steps, states, prices=fees, rate=rate)
    half = steps[0] / 2
    scale = half.square().mean()  # costs count in squares of half a step
    for row in range(2):

        def cost(p: list[int], row: int = row) -> float:
            errors = weight[row] - torch.tensor(p) * half
            if fees is not None and (errors.abs() > 2 * half).any():
                return math.inf
            bits = 0.0 if fees is None else sum(price(fees, row, j, value) for j, value in enumerate(p))
            return float(errors.square().sum() / scale) + rate * bits

        near = [range(k - 2, k + 2) for k in (weight[row] / steps[0]).round().int().tolist()]
        best = plain.best_walk(cost, near, states)
        expected = pytest.approx(cost(plain.decode(best, states)), rel=1e-4, abs=1e-5)
        assert cost(plain.decode(found[row].tolist(), states)) == expected


def price(fees: Prices, row: int, column: int, p: int) -> float:
    """Bits of a point, from the table."""
    most = fees.table.size(2) // 2
    return float(fees.table[fees.classes[row, column], p % 2, min(max(p // 2, -most), most) + most])


@pytest.mark.parametrize("steps", [torch.full((20, 1), 0.4), 0.2 + torch.rand(1, 60), 0.2 + torch.rand(20, 60)])
def test_one_state_rounds_and_with_feedback_is_gptq(steps: Tensor) -> None:
    weight = drawn(20, 60)
    assert torch.equal(search(weight, steps, 1), (weight / steps).round().short())
    factor = gptq.reverse_factor(gram(60), 0.01)
    q, _ = gptq.feedback(weight, steps, factor.double(), 2**14)
    assert torch.equal(search(weight, steps, 1, factor), q)


@pytest.mark.parametrize("states", [1, 4, 8])
def test_feedback_lowers_the_loss_of_what_is_decoded(states: int) -> None:
    """Each survivor's own errors are those of the row that is decoded in the end."""
    weight, inputs = drawn(24, 70), gram(70)
    factor, step = gptq.reverse_factor(inputs, 0.01), torch.tensor([[0.5]])
    losses = []
    for fed in (None, factor):
        q = search(weight, step, states, fed)
        errors = weight - torch.tensor([plain.decode(row, states) for row in q.tolist()]) * 0.25
        losses.append(gptq.output_loss(errors, factor))
    assert losses[1] < 0.75 * losses[0]


def test_feedback_keeps_what_the_trellis_gains() -> None:
    """With steps that follow the factor, every weight's share of the loss is that of plain Gaussian samples."""
    x = drawn(1000, 256) @ (torch.eye(256) + 0.5 * drawn(256, 256, 1) / 16)
    weight, factor = drawn(64, 256), gptq.reverse_factor(x.T @ x / 1000, 0.01)
    steps = 0.37 * (factor.diagonal().log().mean().exp() / factor.diagonal())[None]
    losses = []
    for states in (1, 8):
        p = points(search(weight, steps, states, factor), states)
        losses.append(gptq.output_loss(weight - p * steps / 2, factor))
    # the fine grid of the trellis has half the steps: at equal steps it errs less by the whole gain of 1.09 dB
    assert 10 * math.log10(losses[0] / losses[1]) == pytest.approx(1.09, abs=0.12)


def test_search_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, factor = drawn(21, 40), gptq.reverse_factor(gram(40), 0.01)
    steps, offset = 0.3 + torch.rand(21, 1), 0.1 * drawn(21, 40, 5)
    fees = prices((2 * drawn(21, 40, 6)).round().short(), 4)
    whole = search(weight, steps, 4, factor, offset, fees, 0.1)
    monkeypatch.setattr(viterbi, "MOST_SURVIVORS", 16)  # four rows at a time
    assert torch.equal(search(weight, steps, 4, factor, offset, fees, 0.1), whole)


# -- gains -------------------------------------------------------------------------------------------------------------


def coded_bits(q: Tensor, states: int) -> float:
    return 8 * len(ENTROPY.encode([stored(q, states)], 0)) / q.numel()


@functools.cache
def measured(states: int, step: float) -> tuple[float, float]:
    """Bits in the coder's stream and error in dB, a sample of 2^17 Gaussian ones."""
    weight = drawn(128, 1024)
    q = search(weight, torch.tensor([[step]]), states)
    error = weight - points(q, states) * (step / 2)
    return coded_bits(q, states), 10 * math.log10(float(error.square().mean()))


def gain(states: int, step: float = 0.37) -> float:
    """dB at equal coded bits, along the line through two steps without a trellis."""
    bits, error = measured(states, step)
    (first, high), (second, low) = measured(1, step), measured(1, 0.9 * step)
    return high + (low - high) * (bits - first) / (second - first) - error


GAINS = [(4, 1.00), (8, 1.09), (16, 1.15), (64, 1.26)]


@pytest.mark.parametrize(("states", "expected"), GAINS)
def test_gain_at_equal_coded_bits(states: int, expected: float) -> None:
    """In dB; granular gains of these codes as simulated elsewhere with ideal codes (Marcellin and Fischer 1990)."""
    assert gain(states) == pytest.approx(expected, abs=0.03)


def test_more_states_err_less_at_one_step() -> None:
    weight, errors = drawn(16, 512), []
    for states in STATES:
        p = points(search(weight, torch.tensor([[0.4]]), states), states)
        errors.append(float((weight - p * 0.2).square().mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.76 * errors[0]


@pytest.mark.parametrize("states", [1, 8])
def test_prices_lower_the_bits_at_one_step(states: int) -> None:
    """By more than what the error grows by is worth, which is six dB a bit."""
    weight, step = drawn(64, 512), torch.tensor([[1.0]])
    q = search(weight, step, states)
    cheap = search(weight, step, states, prices=prices(q, states), rate=SLOPE)
    bits = [cross_entropy_bits([stored(found, states)]) / weight.numel() for found in (q, cheap)]
    errors = [float((weight - points(found, states) / 2).square().mean()) for found in (q, cheap)]
    assert bits[1] < bits[0] - 0.05 and errors[1] > errors[0]
    assert bits[0] - bits[1] > 0.5 * math.log2(errors[1] / errors[0])
