"""The trellis and its search: against all walks of short rows, its gains in coded bits, feedback and prices."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from golfbook.compress import gptq
from golfbook.compress.coders import entry_of
from golfbook.compress.entropy import ENTROPY
from golfbook.compress.estimates import cross_entropy_bits
from golfbook.compress.quantizer import QuantizedTensor
from golfbook.compress.trellis import POLYNOMIALS, points, transitions
from golfbook.compress.viterbi import predecessors, prices, search
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
    """Also where columns have steps of their own, and where integers have prices."""
    weight = drawn(2, columns, seed)
    steps = torch.full((1, columns), 0.9) if even else 0.5 + torch.rand(1, columns)
    fees = prices((3 * drawn(2, columns, seed + 1)).round().short(), states) if rate else None
    found = search(weight, steps, states, prices=fees, rate=rate)
    half = steps[0] / 2
    scale = half.square().mean()  # costs count in squares of half a step
    for row in range(2):

        def cost(p: list[int], row: int = row) -> float:
            values = torch.tensor(p)
            error = float((weight[row] - values * half).square().sum() / scale)
            bits = sum(float(fees.of(j, values[None, j, None].expand(2, 1))[row, 0]) for j in range(columns)) if fees else 0.0
            return error + rate * bits

        near = [range(k - 2, k + 2) for k in (weight[row] / steps[0]).round().int().tolist()]
        if fees is None:
            assert cost(plain.decode(found[row].tolist(), states)) == pytest.approx(
                cost(plain.decode(plain.best_walk(cost, near, states), states)), rel=1e-4, abs=1e-5
            )
        elif columns <= 4:
            best = cost(plain.decode(plain.best_walk(cost, near, states), states))
            assert cost(plain.decode(found[row].tolist(), states)) == pytest.approx(best, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("steps", [torch.full((20, 1), 0.4), 0.2 + torch.rand(1, 60), 0.2 + torch.rand(20, 60)])
def test_one_state_rounds_and_with_feedback_is_gptq(steps: Tensor) -> None:
    weight = drawn(20, 60)
    assert torch.equal(search(weight, steps, 1), (weight / steps).round().short())
    factor = gptq.reverse_factor(gram(60), 0.01)
    q, _ = gptq.feedback(weight, steps, factor.double(), 2**14)
    assert torch.equal(search(weight, steps, 1, factor), q)
