"""Statistics of a model's matrices against loops over positions and autograd; where calibration text comes from."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from golfbook.compress import calibration
from golfbook.compress.quantizer import Statistics
from golfbook.compress.statistics import collect
from golfbook.config.load import load_config
from golfbook.data.shards import write_shard
from golfbook.data.tokenizer import Tokenizer
from golfbook.errors import ConfigError, DataError
from golfbook.model.gpt import GPT, exported_state, initialise

ROWS, TIME = 2, 20
SMALL = {
    "model.vocab_size": 31,
    "model.model_dim": 16,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.rope_dims": 4,
    "model.num_layers": 3,
    "model.xsa": 1,
    "model.bigram.vocab_size": 23,
    "model.bigram.dim": 8,
    "model.value_embedding.dim": 8,
    "model.ttt_linear.num_heads": 2,
    "model.logit_softcap": 3.0,
}
EVERYTHING = {
    "model.bigram.trigram": True,
    "model.recurrence": [1, 2],
    "model.recurrence_place": "in_place",
    "model.gated_attention": True,
    "model.depth_gate": True,
    "model.value_residual": "lambda",
    "model.canon.last_n": 1,
    "model.mtp.num_heads": 1,
    **{f"model.{name}.enabled": True for name in ("ttt_linear", "flow", "native_flow")},
}
OPTIONS: dict[str, dict] = {"plain": {}, "everything": EVERYTHING, "untied": {"model.tie_embeddings": False}}


def noisy(overrides: dict) -> GPT:
    """A small model none of whose weights is at the zero or one that it starts from."""
    model = initialise(GPT(load_config("quickstart", overrides={**SMALL, **overrides}).model), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def texts(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(31, (count, ROWS, TIME + 1), generator=generator)
    return [(text[:, :-1], text[:, 1:]) for text in drawn]


class Calls:
    """What each linear map and table was given and returned in one forward pass, kept whole."""

    def __init__(self, model: GPT, tokens: Tensor) -> None:
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
        handles = [
            module.register_forward_hook(lambda _, given, out, name=name: self._keep(f"{name}.weight", given[0], out))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Embedding)
        ]
        self.hidden = model.hidden(tokens)
        for handle in handles:
            handle.remove()

    def _keep(self, name: str, given: Tensor, out: Tensor) -> None:
        self.seen.setdefault(name, []).append((given, out))


def reference(model: GPT, batches: list[tuple[Tensor, Tensor]], passes: int = 2) -> dict[str, dict[str, Tensor]]:
    """The statistics by loops over inputs, one at a time; gradients by autograd from the whole loss."""
    model.eval()
    found: dict[str, dict[str, Tensor]] = {}
    inputs: dict[str, int] = {}
    positions = sum(tokens.numel() for tokens, _ in batches)

    def add(name: str, kind: str, value: Tensor) -> None:
        kinds = found.setdefault(name, {})
        kinds[kind] = kinds[kind] + value if kind in kinds else value

    for tokens, targets in batches:
        calls = Calls(model, tokens)
        head = model.head.detach()
        z = calls.hidden @ head.T
        loss = F.cross_entropy((3 * torch.tanh(z / 3)).flatten(0, 1), targets.flatten(), reduction="sum")
        for name, seen in calls.seen.items():
            table = seen[0][0].dtype == torch.int64
            kept = seen if table or not name.startswith("blocks") else seen[:passes]
            slopes = torch.autograd.grad(loss, [out for _, out in kept], retain_graph=True)
            for (given, _), slope in zip(kept, slopes, strict=True):
                for row in given.flatten() if table else given.detach().double().reshape(-1, given.size(-1)):
                    if table:
                        add(name, "count", F.one_hot(row, len(model.get_parameter(name))).double())
                    else:
                        add(name, "gram", torch.outer(row, row))
                    inputs[name] = inputs.get(name, 0) + 1
                for row in slope.double().reshape(-1, slope.size(-1)):
                    add(name, "gradient", row**2)
        name, kind = ("tok_emb.weight", "output") if model.config.tie_embeddings else ("lm_head.weight", "gradient")
        for state, slope in zip(calls.hidden.flatten(0, 1), torch.autograd.grad(loss, z)[0].flatten(0, 1), strict=True):
            add(name, "gram", torch.outer(state.detach().double(), state.detach().double()))
            add(name, kind, slope.double() ** 2)
    for name, kinds in found.items():
        for kind, total in kinds.items():
            by_input = kind == "gradient" and name in inputs
            kinds[kind] = total / (inputs[name] if by_input else positions)
    return found


def assert_equal(found: Statistics, expected: Statistics, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, kinds in expected.items():
        assert found[name].keys() == kinds.keys(), name
        for kind, value in kinds.items():
            assert found[name][kind].dtype == torch.float32
            scale = value.abs().max()
            assert scale > 0, (name, kind)
            assert (found[name][kind] - value).abs().max() <= tolerance * scale, (name, kind)


@pytest.mark.parametrize("option", OPTIONS)
def test_loops_and_autograd_give_the_same(option: str) -> None:
    model = noisy(OPTIONS[option])
    found = collect(model, texts(), gradients=True)
    assert_equal(found, reference(model, texts()))
    matrices = {name for name, tensor in exported_state(model).items() if name.endswith("weight") and tensor.ndim == 2}
    assert found.keys() == matrices - {n for n in matrices if "canon" in n}  # its taps are no linear map of vectors


def test_shapes_are_those_of_the_tensor() -> None:
    model = noisy(EVERYTHING)
    for name, kinds in collect(model, texts(), gradients=True).items():
        rows, columns = model.get_parameter(name).shape
        shapes = {kind: tuple(value.shape) for kind, value in kinds.items()}
        expected = {"gram": (columns, columns), "gradient": (rows,)}
        if "count" in kinds:
            expected = {"count": (rows,), "gradient": (columns,)}
            if name == "tok_emb.weight":
                expected |= {"gram": (columns, columns), "output": (rows,)}
        assert shapes == expected, name


def test_maps_of_one_input_share_its_gram_matrix() -> None:
    found = collect(noisy(EVERYTHING), texts(), gradients=False)
    assert all("gradient" not in kinds and "output" not in kinds for kinds in found.values())
    maps = ("c_q", "c_k", "c_v", "attn_gate")
    for block in range(3):
        assert len({id(found[f"blocks.{block}.attn.{name}.weight"]["gram"]) for name in maps}) == 1
    assert len({id(found[f"ttt_refiner.theta_{name}.weight"]["gram"]) for name in "KVQ"}) == 1
    several = [
        f"blocks.{b}.{name}.weight" for b in range(3) for name in ("attn.c_q", "attn.proj", "mlp.fc", "mlp.proj")
    ]
    assert len({id(found[name]["gram"]) for name in several}) == len(several)


def test_second_passes_can_be_left_out() -> None:
    """As the published runs have it; first passes, tables and what comes after are the same."""
    model = noisy(EVERYTHING)
    both, first = (collect(model, texts(), gradients=True, recurrence=flag) for flag in (True, False))
    assert_equal(first, reference(model, texts(), passes=1))
    repeated = {name for name in both if name.startswith(("blocks.1.", "blocks.2."))}
    for name in both:
        if "gram" in both[name]:
            assert (both[name]["gram"].trace() > 1.2 * first[name]["gram"].trace()) == (name in repeated), name
    assert torch.equal(both["bigram.embed.weight"]["count"], first["bigram.embed.weight"]["count"])


def test_products_of_gradients_have_the_squares_on_their_diagonal() -> None:
    """Of linear maps but the head; their entries are those of autograd, here of a block that runs twice."""
    model = noisy(EVERYTHING)
    found = collect(model, texts(), gradients=True, outputs=True)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, kinds in found.items() if "outputs" in kinds} == linear & found.keys()
    for name in linear & found.keys():
        square = found[name]["outputs"]
        assert square.shape == (len(model.get_parameter(name)),) * 2
        torch.testing.assert_close(square.diagonal(), found[name]["gradient"], rtol=1e-4, atol=1e-9)
    sums, inputs, name = torch.zeros(32, 32), 0, "blocks.1.mlp.fc.weight"
    for tokens, targets in texts():
        calls = Calls(model, tokens)
        loss = F.cross_entropy(model.capped(calls.hidden @ model.head.detach().T).flatten(0, 1), targets.flatten())
        for _, out in calls.seen[name]:
            slope = torch.autograd.grad(loss * targets.numel(), out, retain_graph=True)[0].flatten(0, 1)
            sums, inputs = sums + slope.T @ slope, inputs + len(slope)
    assert inputs == 2 * 2 * ROWS * TIME
    torch.testing.assert_close(found[name]["outputs"], sums / inputs, rtol=1e-4, atol=1e-7)


def test_counts_are_shares_of_positions() -> None:
    found = collect(noisy(EVERYTHING), texts(), gradients=False)
    tokens = torch.cat([tokens for tokens, _ in texts()])
    share = torch.bincount(tokens.flatten(), minlength=31) / tokens.numel()
    for name in ("tok_emb.weight", "ve_shared.embed.weight"):
        torch.testing.assert_close(found[name]["count"], share)
    counts = found["bigram.embed.weight"]["count"]
    assert counts.sum().item() == pytest.approx(2)  # pairs and triples
    assert counts[-1].item() == pytest.approx(3 / TIME)  # positions 0; 0 and 1


def test_they_predict_what_an_error_of_the_head_costs() -> None:
    """1/2 sum g_i e_i H e_i^T is the mean loss of a random small error, once inputs and gradients are independent."""
    model = noisy({"model.tie_embeddings": False}).eval()
    generator = torch.Generator().manual_seed(3)
    batches = []
    for tokens, _ in texts(40):  # targets that the model itself draws: the Fisher information is then the curvature
        with torch.no_grad():
            drawn = torch.multinomial(model(tokens).flatten(0, 1).softmax(-1), 1, generator=generator)
        batches.append((tokens, drawn.view_as(tokens)))
    found = collect(model, batches, gradients=True)["lm_head.weight"]

    @torch.no_grad()
    def loss() -> float:
        return torch.stack([model.loss(*batch).double() for batch in batches]).mean().item()

    costs, predicted = [], []
    before, weight = loss(), model.lm_head.weight.detach().clone()
    for _ in range(30):
        error = 0.05 * torch.randn(weight.shape, generator=generator)
        for sign in (1, -1):  # the first-order term cancels
            with torch.no_grad():
                model.lm_head.weight.copy_(weight + sign * error)
            costs.append(loss() - before)
        predicted.append(0.5 * (found["gradient"] @ ((error @ found["gram"]) * error).sum(1)).item())
    assert np.mean(costs) == pytest.approx(np.mean(predicted), rel=0.15)


def test_the_model_is_left_as_it_was() -> None:
    model = noisy(EVERYTHING).train()
    model.checkpoint_activations = True
    model.smear.gate.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = collect(model, texts(), gradients=True)
    assert model.training and model.checkpoint_activations
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["smear.gate"]
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert_equal(found, collect(model.eval(), texts(), gradients=True), 1e-6)


def test_bfloat16_activations_are_added_in_float32() -> None:
    model = noisy(EVERYTHING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = collect(model, texts(), gradients=True)
        calls = Calls(model.eval(), texts()[0][0]), Calls(model, texts()[1][0])
    x = torch.cat([call.seen["blocks.0.mlp.fc.weight"][0][0].float().flatten(0, 1) for call in calls])
    torch.testing.assert_close(found["blocks.0.mlp.fc.weight"]["gram"], x.mT @ x / len(x))


def test_no_text_is_an_error() -> None:
    with pytest.raises(DataError, match="at least one batch"):
        collect(noisy({}), [], gradients=False)


def _process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = collect(noisy(EVERYTHING), texts(3)[:2] if rank == 0 else texts(3)[2:], gradients=True)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_process, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert_equal(found[0], found[1], 0)
    assert_equal(found[0], collect(noisy(EVERYTHING), texts(3), gradients=True))


class TrainingOnly(SimpleNamespace):
    """A dataset of which nothing but the tokenizer and the training shards may be touched."""

    def __getattr__(self, name: str) -> None:
        raise AssertionError(f"calibration touched the dataset's {name}")


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[TrainingOnly]:
    tokenizer = Tokenizer.load(Path(__file__).parent / "data/fineweb_1024_bpe.model")
    for number in range(2):
        write_shard(tmp_path / f"text_train_{number:06d}.bin", number * 400 + np.arange(400))
    (tmp_path / "text_val_000000.bin").mkdir()  # not even a file: whoever opens it fails
    yield TrainingOnly(tokenizer=tokenizer, train_shards=sorted(tmp_path.glob("*_train_*")), folder=tmp_path)


@pytest.mark.parametrize("source", ["training", "generated", "random"])
def test_calibration_reads_no_validation_text(source: calibration.Source, dataset: TrainingOnly) -> None:
    model = noisy({"model.vocab_size": 1100}).train()

    def drawn(seed: int) -> Tensor:
        made = calibration.batches(source, model, dataset, sequences=5, length=TIME, seed=seed)
        assert all(torch.equal(tokens[:, 1:], targets[:, :-1]) for tokens, targets in made)
        return torch.cat([torch.cat((tokens, targets[:, -1:]), 1) for tokens, targets in made])

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert first.shape == (5, TIME + 1) and first.dtype == torch.int64
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() >= 0 and first.max() < dataset.tokenizer.vocab_size  # the model knows more than that
    assert model.training
    if source == "training":
        assert (first.diff() == 1).all()  # whole windows of one shard
        assert len(set(first[:, 0].tolist())) == 5


def test_long_calibration_comes_in_batches(dataset: TrainingOnly, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "BATCH_TOKENS", 2 * TIME)
    model = noisy({"model.vocab_size": 1024})
    for source in ("training", "generated", "random"):
        made = calibration.batches(source, model, dataset, sequences=5, length=TIME, seed=0)
        assert [tuple(part.shape) for pair in made for part in pair] == [(2, TIME)] * 4 + [(1, TIME)] * 2


def test_generated_text_is_what_the_model_expects(dataset: TrainingOnly) -> None:
    """Without temperature: each token is the argmax of the whole forward pass; text at 1 has the model's own loss."""
    model = noisy({"model.vocab_size": 1024}).eval()
    ((tokens, targets),) = calibration.batches(
        "generated", model, dataset, sequences=4, length=TIME, seed=0, temperature=0
    )
    with torch.no_grad():
        assert torch.equal(model(tokens).argmax(-1), targets)
    ((tokens, targets),) = calibration.batches("generated", model, dataset, sequences=64, length=TIME, seed=0)
    with torch.no_grad():
        likely = model(tokens).log_softmax(-1)
    entropy = -(likely.exp() * likely).sum(-1).mean()
    charged = F.cross_entropy(likely.flatten(0, 1), targets.flatten())
    assert charged.item() == pytest.approx(entropy.item(), rel=0.05)


@pytest.mark.parametrize("wrong", [{"sequences": 0}, {"length": 0}, {"temperature": -0.5}])
def test_calibration_settings_out_of_range_are_named(wrong: dict, dataset: TrainingOnly) -> None:
    settings = {"sequences": 1, "length": 4, "temperature": 1.0, **wrong}
    with pytest.raises(ConfigError, match="calibration needs"):
        calibration.batches("random", noisy({}), dataset, seed=0, **settings)
