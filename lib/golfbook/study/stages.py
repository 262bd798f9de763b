"""The three stages of a run as plain functions: what the stage notebooks and the tour call.

Each one is skipped where its result is there and still fits, runs the stages before it where they are missing, and
leaves ``result.<stage>.json`` last: ``ok``, or ``failed`` with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from golfbook import activity, compute
from golfbook.compress.budget import code_bytes, size_report
from golfbook.compress.calibration import calibrate
from golfbook.compress.container import read_artifact
from golfbook.compress.export import export
from golfbook.compress.quantizer import dequantize
from golfbook.data import dataset
from golfbook.errors import ArtifactError, GolfbookError, RunError
from golfbook.evaluate import scoring
from golfbook.files import atomic_write_bytes, sha256_file
from golfbook.model.gpt import GPT
from golfbook.run import STAGES, Run
from golfbook.train import choices, launcher
from golfbook.train.checkpoints import load_model


@activity.step("starting the trainer")
def run_training(run: Run, on_update: launcher.Update | None = None) -> dict[str, Any]:
    """Train in a subprocess, following its metrics; see :func:`golfbook.train.launcher.follow`."""

    require_same_data(run, dataset.prepare(run.config))
    if not run.is_done("training"):  # no lock: any number of watchers may follow one trainer
        started = launcher.launch(run)
        try:
            return launcher.follow(run, on_update)
        except RunError:
            failed = (run.read_result("training") or {}).get("status") == "failed"
            if started or failed:
                raise
        launcher.launch(run)  # the trainer found alive had just been killed and was on its way out: resume it
        return launcher.follow(run, on_update)
    return _result(run, "training")


def run_quantization(run: Run) -> dict[str, Any]:
    """Quantise the trained weights, write ``artifact.golf``, read it back and score what was read."""

    def work(data: dataset.Dataset) -> None:
        config = run.config
        trained = load_model(run)
        checkpoint_hash = sha256_file(run.checkpoint_path)
        started = time.perf_counter()
        statistics = calibrate(trained, config, data)
        calibrated = time.perf_counter()
        limit = config.budget.limit_bytes - code_bytes()
        fitted = export(run.artifact_path, trained, config, data.tokenizer.sha256, statistics, limit)
        seconds = time.perf_counter() - calibrated
        atomic_write_bytes(run.tokenizer_path, data.tokenizer.path.read_bytes())
        if fitted.warning:
            print(f"{run.name}: {fitted.warning}", flush=True)
        trained.load_state_dict(dequantize(fitted.quantized), strict=config.model.mtp.num_heads == 0)
        in_memory = _score(run, trained, data, config.window)
        loaded = read_artifact(run.artifact_path)
        reloaded = _score(run, loaded.build(), data, config.window)
        if in_memory["val_loss"] != reloaded["val_loss"]:
            raise ArtifactError(
                f"{run.artifact_path}: the reloaded artifact scores {reloaded['val_loss']}, its weights in memory "
                f"{in_memory['val_loss']} nats; the file does not hold what was quantised"
            )
        before = run.read_result("training") or {}
        run.write_result(
            "quantization",
            {
                "val_loss": reloaded["val_loss"],
                "val_bpb": reloaded["val_bpb"],
                "dequantized_val_loss": in_memory["val_loss"],
                "float_val_bpb": before["val_bpb"],
                "tax_bpb": reloaded["val_bpb"] - before["val_bpb"],
                "unigram_bpb": data.info["unigram_bpb"],
                "validation_changes": data.info["validation_changes"],
                "calibration_seconds": calibrated - started,
                "quantize_seconds": seconds,
                **size_report(loaded.bytes, config.budget.limit_bytes),
                **fitted.report(),
            },
            reads={run.checkpoint_path.name: checkpoint_hash, "dataset": data.fingerprint},
            writes=run.artifact_path,
        )

    return _stage(run, "quantization", work)


def run_scoring(run: Run) -> dict[str, Any]:
    """Score ``artifact.golf`` alone, in contiguous and in sliding windows; the sliding one is the headline."""

    def work(data: dataset.Dataset) -> None:
        config = run.config
        loaded = read_artifact(run.artifact_path)
        if loaded.tokenizer_sha256 != data.tokenizer.sha256:
            raise ArtifactError(f"{run.artifact_path} was made with another tokenizer than this run's validation split")
        model = loaded.build()
        contiguous = _score(run, model, data, config.window)
        started = time.perf_counter()
        sliding = _score(run, model, data, config.score.stride)
        run.write_result(
            "test_time_training",
            {
                **sliding,
                "contiguous_val_bpb": contiguous["val_bpb"],
                "stride": config.score.stride,
                "window": config.window,
                "score_seconds": time.perf_counter() - started,
                "artifact_bytes": loaded.bytes,
                "unigram_bpb": data.info["unigram_bpb"],
                "validation_changes": data.info["validation_changes"],
            },
            reads={run.artifact_path.name: loaded.sha256, "dataset": data.fingerprint},
            writes=run.artifact_path,
        )

    return _stage(run, "test_time_training", work)


def ensure(run: Run, stage: str) -> dict[str, Any]:
    """Run a stage and whatever it needs; returns its result."""
    runners: dict[str, Callable[[Run], dict[str, Any]]] = {
        "training": run_training,
        "quantization": run_quantization,
        "test_time_training": run_scoring,
    }
    if stage not in runners:
        raise RunError(f"unknown stage '{stage}' (stages: {', '.join(STAGES)})")
    return runners[stage](run)


def require_same_data(run: Run, data: dataset.Dataset) -> None:
    """Raise RunError where finished stages of a run used another dataset than its config gives now."""
    for stage in STAGES:
        used = ((run.read_result(stage) or {}).get("reads") or {}).get("dataset", data.fingerprint)
        if used != data.fingerprint:
            raise RunError(
                f"{run.name}: stage '{stage}' used dataset {used[:12]}, but its data are now {data.fingerprint[:12]} "
                "(a text file or the version of a package has changed); its results stay as they are: use another "
                f"study name for the new data, or delete {run.path}"
            )


def _stage(run: Run, stage: str, work: Callable[[dataset.Dataset], None]) -> dict[str, Any]:
    data = dataset.prepare(run.config)
    require_same_data(run, data)
    if run.is_done(stage):
        return _result(run, stage)
    if run.is_locked(f"compute-{stage}"):
        print(f"{run.name}: waiting for another process that works on stage '{stage}'", flush=True)
    with run.lock(f"compute-{stage}"):
        if not run.is_done(stage):
            ensure(run, STAGES[STAGES.index(stage) - 1])
            try:
                with activity.step("quantising" if stage == "quantization" else "scoring"):
                    work(data)
            except GolfbookError as error:
                run.write_failure(stage, str(error))
                raise
    return _result(run, stage)


def _result(run: Run, stage: str) -> dict[str, Any]:
    result = run.read_result(stage)
    if result is None or not run.is_done(stage):
        raise RunError(f"{run.name}: stage '{stage}' left no result that fits its files")
    return result


def _score(run: Run, model: GPT, data: dataset.Dataset, stride: int) -> dict[str, Any]:
    config = run.config
    device = compute.choose_device(config)
    choices.set_up(config.machine.threads, device, run)
    with activity.step("scoring") as progress:
        nll = scoring.score(
            model.to(device), data.val_tokens, window=config.window, stride=stride,
            batch_windows=config.score.batch_windows, device=device, progress=progress,
        )  # fmt: skip
    return scoring.summarize(nll, data.val_bytes)
