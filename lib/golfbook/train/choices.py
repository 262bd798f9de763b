"""Which candidates are fastest on this machine, measured once and kept: precision, library of products, attention.

A processor's flags do not tell: bfloat16 products are nine times as fast as float32 ones on one, half as fast on
another with the same flag. So the candidates run here, in under five seconds, and the default is left only for a clear
gain. The figures are kept in the cache under the identity of processor, libraries and switches, copied to the study and
from there to each of its runs: all runs of a study on one kind of machine agree, and a resumed run computes as before.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from golfbook import activity, compute
from golfbook.compute import Choices
from golfbook.config.load import validate
from golfbook.errors import GolfbookError
from golfbook.files import atomic_write_json, cache_root, canonical_json, read_json, sha256_bytes
from golfbook.model import attention
from golfbook.model.gpt import GPT, initialise
from golfbook.provenance import processor
from golfbook.run import Run
from golfbook.train.step import TrainingStep

CLEAR_GAIN = 1.10  # a default is left only for a candidate that is faster by this factor: noise must flip nothing
HOPELESS = 2.0  # bfloat16 products slower than float32 ones by this factor: nothing else in bfloat16 is measured
SECONDS = {"products": 0.15, "attention": 0.12, "precision": 0.3}  # of each race, after its warm-up
TRIAL = "products of 256 x 256"
FILE = "choices.json"
SWITCHES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
LENGTHS = {"short": 256, "long": 2048}
TRIAL_MODELS: dict[str, dict[str, Any]] = {
    "short": {  # that of the preset quickstart
        **{"num_layers": 4, "model_dim": 128, "num_heads": 4, "num_kv_heads": 2, "mlp_mult": 2.0, "rope_dims": 16},
        **{"xsa": 2, "bigram": {"vocab_size": 1024, "dim": 32}, "value_embedding": {"dim": 32, "layers": [-2, -1]}},
    },
    "long": {"num_layers": 1, "xsa": 1, "value_embedding": {"layers": [0]}},
}
Call = Callable[[], object]
log = logging.getLogger(__name__)


def decide(seconds: Mapping[str, float], default: str) -> str:
    """Return the fastest candidate, or ``default`` where the fastest is not faster by a clear gain."""
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[default] >= CLEAR_GAIN * seconds[best] else default


def race(candidates: Mapping[str, Call], seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    """Return the least time of each candidate by ``clock``; they take turns for ``seconds``, twice at least."""
    default, *others = candidates
    candidates[default]()  # warm-up: memory, kernels, caches
    able = {default: candidates[default]}
    for name in others:
        try:
            candidates[name]()
            able[name] = candidates[name]
        except RuntimeError as error:  # a package built for another torch, a GPU that others have filled
            log.warning("'%s' is left out of what is measured: %s", name, error)
    candidates = able
    found = dict.fromkeys(candidates, float("inf"))
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 2 or time.perf_counter() < end:
        for name, run in candidates.items():
            started = clock()
            run()
            found[name] = min(found[name], clock() - started)
        rounds += 1
    return found


def measure(device: torch.device) -> Choices:
    """Time all candidates on this machine and choose; takes under 5 seconds. Leaves the process's settings changed.

    On a CPU one thread computes and its CPU time counts, for runs with several threads too: the time of several
    depends on what else is running.
    """
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        return _measure(device)


def _measure(device: torch.device) -> Choices:
    clock = _clock(device)
    compute.prepare(1, device, Choices())
    seconds: dict[str, dict[str, float]] = {}

    def choose(name: str, kind: str, candidates: Mapping[str, Call]) -> Any:
        if len(candidates) == 1:  # nothing to measure
            return next(iter(candidates))
        seconds[name] = race(candidates, SECONDS[kind], clock)
        return decide(seconds[name], next(iter(candidates)))

    products = choose("products", "products", _products(device))
    compute.prepare(1, device, Choices(products))
    dtypes = [torch.float32, torch.bfloat16]
    small = {str(t).removeprefix("torch."): torch.ones(256, 256, dtype=t, device=device) for t in dtypes}
    seconds[TRIAL] = race({name: functools.partial(torch.mm, x, x) for name, x in small.items()}, 0.05, clock)
    if seconds[TRIAL].get("bfloat16", float("inf")) > HOPELESS * seconds[TRIAL]["float32"]:
        dtypes.pop()
    backends = {}
    for training in (True, False):
        for dtype in dtypes:
            for time_ in LENGTHS.values():
                case = compute.case(training, dtype, time_)
                backends[case] = choose(f"attention, {case}", "attention", _attention(device, dtype, training, time_))
    compute.prepare(1, device, Choices(products, attention=backends))
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    precision = {
        length: choose(f"precision, {length}", "precision", {name: _step(length, name, device) for name in names})
        for length in LENGTHS
    }
    return Choices(products, precision, backends, seconds, identity(device))


def set_up(threads: int, device: torch.device, run: Run | None = None) -> Choices:
    """Set up this process with what is fastest for a run, or on this machine where there is no run; returns it.

    torch's compiler gets a cache for this kind of machine alone: it would take up code made for other vector units.
    """
    compiled = cache_root() / "inductor" / _key(identity(device))
    with contextlib.suppress(OSError):  # a read-only cache: torch's own place, as where a blank would cut its command
        compiled.mkdir(parents=True, exist_ok=True)
        if " " not in str(compiled) and os.access(compiled, os.W_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    chosen = of_machine(device) if run is None else of_run(run, device)
    compute.prepare(threads, device, chosen)
    return chosen


def of_machine(device: torch.device) -> Choices:
    """Return what was measured on this machine, from the cache; measure now where the cache has nothing."""
    who = identity(device)
    path = cached(who)
    with _lock(path.with_suffix(".lock")):
        found = _choices(read_json(path))
        if found is None:
            with activity.step("measuring what is fastest on this machine"):
                found = measure(device)
            _write(path, asdict(found))
    return found


def cached(who: Mapping[str, str]) -> Path:
    """Return the file that keeps what was measured on the machine with this :func:`identity`."""
    return cache_root() / "choices" / f"{_key(who)}.json"


def of_run(run: Run, device: torch.device) -> Choices:
    """Choose what a run computes with: as before where it has begun, as its study does on such a machine, or measured.

    The decision is written into the folders of the study and of the run.
    """
    path = run.path / FILE  # by kind of device: a notebook beside a GPU's trainer computes on the CPU
    with _lock(run.path / f".{FILE}.lock"):
        known = read_json(path)
        kept = _choices(known.get(device.type))
        obstacle = "" if kept is None else why_not(kept, device)
        if kept is not None and not obstacle:
            return kept
        if obstacle:
            log.warning("%s was begun with choices that cannot run here (%s); measured again", run.name, obstacle)
        found = _of_study(run.path.parent, device)
        _write(path, {**known, device.type: asdict(found)})
    return found


def why_not(choices: Choices, device: torch.device) -> str:
    """Return why choices made elsewhere cannot be followed on this device; empty where they can."""
    for case, backend in choices.attention.items():
        use, dtype, _ = case.split(", ")
        reason = attention.why_not(backend, device, getattr(torch, dtype), training=use == "training")
        if reason:
            return reason
    if device.type == "cpu" and not compute.products_are_exact(choices.products):
        return f"{choices.products} rounds float32 products to bfloat16 here"
    return ""


def describe(choices: Choices) -> list[str]:
    """Describe each choice in a line: what was taken, and the milliseconds of every candidate."""
    taken: dict[str, str] = {"products": choices.products}
    taken |= {f"precision, {length}": name for length, name in choices.precision.items()}
    taken |= {f"attention, {case}": name for case, name in choices.attention.items()}
    lines = []
    for name in (*taken, *(choices.seconds.keys() - taken.keys())):
        times = choices.seconds.get(name, {})
        figures = ", ".join(f"{candidate} {1000 * seconds:.3g} ms" for candidate, seconds in times.items())
        lines.append(f"{name}: {taken.get(name, 'measured')} ({figures or 'no other candidate'})")
    return lines


def identity(device: torch.device) -> dict[str, str]:
    """Return everything that decides which candidate is fastest: processor, torch and its libraries, switches."""
    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(exactly=True),
        "torch": torch.__version__,
        "libraries": sha256_bytes(torch.__config__.show().encode())[:10],  # MKL, oneDNN, CUDA and their releases
        "vector_units": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        found["flash3"] = attention.flash3_obstacle() or "importable"
    return found | {name: os.environ[name] for name in SWITCHES if os.environ.get(name)}


def title(device: torch.device) -> str:
    """Return the first line of a benchmark: the processor or GPU, and torch."""
    return f"{identity(device)['device']}; torch {torch.__version__}"


def _of_study(folder: Path, device: torch.device) -> Choices:
    key = _key(identity(device))
    with _lock(folder / f".{FILE}.lock"):
        known = read_json(folder / FILE)
        found = _choices(known.get(key))
        if found is None:
            found = of_machine(device)
            _write(folder / FILE, {**known, key: asdict(found)})
    return found


def _choices(value: Any) -> Choices | None:
    try:
        return Choices(**value) if value else None
    except TypeError:  # damaged, or of another version
        return None


def _write(path: Path, value: object) -> None:
    try:
        atomic_write_json(path, value)
    except GolfbookError as error:  # a read-only cache or a full disk: measured again next time
        log.warning("what was measured on this machine could not be kept: %s", error)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock file, so that one process measures while the others wait; none where it cannot be made."""
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError):  # a read-only folder; a file system without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _key(who: Mapping[str, str]) -> str:
    return sha256_bytes(canonical_json(dict(who)).encode())[:16]


def _clock(device: torch.device) -> Callable[[], float]:
    if device.type != "cuda":
        return time.process_time

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized


def _products(device: torch.device) -> dict[str, Call]:
    if device.type != "cpu" or not compute.products_are_exact("onednn"):
        return {"torch": lambda: None}
    generator = torch.Generator().manual_seed(0)
    large, small = (
        (torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator))
        for m, k, n in ((1024, 512, 1024), (1024, 128, 256))
    )

    def multiply(library: compute.Products) -> None:
        compute.use_products(library)
        torch.nn.functional.linear(*large)
        for _ in range(16):  # about as much work as the large one
            torch.nn.functional.linear(*small)

    return {"torch": functools.partial(multiply, "torch"), "onednn": functools.partial(multiply, "onednn")}


def _attention(device: torch.device, dtype: torch.dtype, training: bool, length: int) -> dict[str, Call]:
    """Return a call of each backend, with its backward pass in training: 4 heads, 2 of keys, 64 wide."""
    rows = 2048 // length * (1 if device.type == "cpu" else 8)
    generator = torch.Generator().manual_seed(0)

    def heads(count: int) -> Tensor:
        x = torch.randn(rows, length, count, 64, generator=generator).to(device, dtype).transpose(1, 2)
        return x.requires_grad_(training)

    q, k, v, gradient = heads(4), heads(2), heads(2), heads(4).detach()

    def call(backend: attention.Backend) -> None:
        out = attention.causal_attention(q, k, v, backend)
        if training:
            torch.autograd.grad(out, (q, k, v), gradient)

    return {b: functools.partial(call, b) for b in attention.candidates(device, dtype, training)}


def _step(length: str, precision: str, device: torch.device) -> Call:
    """Return a forward and backward pass of a small model on short sequences, of one published layer on long ones."""
    config = validate({"model": TRIAL_MODELS[length], "machine": {"precision": precision}})
    model = initialise(GPT(config.model), 0)
    step = TrainingStep(model, config, device)
    shape = (4, 256) if length == "short" else (1, 1024)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
    return lambda: step.backward(tokens, tokens)
