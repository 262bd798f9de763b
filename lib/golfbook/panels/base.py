"""Panels: a few controls around a pure function ``state -> figure``, and the live picture of a training run.

>>> from golfbook import panels
>>> panels.show(panels.windows(targets=4096, window=256))

A panel draws into one image of fixed size and swaps its bytes, so nothing flickers; controls report only when they are
let go. Whether a person can move them is asked of the kernel: a front end that a person sits at (JupyterLab, VS Code)
offers to pass typed input on, papermill and nbconvert do not. They get the picture of the panel's default state,
because a control that nothing answers is worse than none, and every viewer can show a picture. ``GOLFBOOK_STATIC=1``
asks for pictures everywhere, ``GOLFBOOK_STATIC=0`` for controls.
"""

from __future__ import annotations

import base64
import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from golfbook.compress import rowwise
from golfbook.config.schema import TrainConfig
from golfbook.errors import GolfbookError
from golfbook.evaluate import scoring
from golfbook.plots import size as size_plots
from golfbook.plots import style as figures
from golfbook.plots import text as text_plots
from golfbook.plots.style import Picture
from golfbook.run import Run

if TYPE_CHECKING:
    import ipywidgets
    import pandas as pd
    from torch import Tensor

    from golfbook.data.tokenizer import Tokenizer
    from golfbook.model.gpt import GPT

CACHED_STATES = 64
REDRAW_SECONDS = 1.0


@dataclass(frozen=True)
class Slider:
    """A number from ``low`` to ``high``."""

    label: str
    default: float
    low: float
    high: float
    step: float = 1


@dataclass(frozen=True)
class Choice:
    """One of several values, each with its label."""

    label: str
    default: Any
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Text:
    """A line of text, taken over on Enter or when the field is left."""

    label: str
    default: str


@dataclass(frozen=True)
class Switch:
    """On or off."""

    label: str
    default: bool


Control = Slider | Choice | Text | Switch


class Panel:
    """Controls around ``draw``, which maps the values of all controls (by name) to a picture.

    ``height`` is the least height of the image in pixels, for pictures whose height depends on their state.
    """

    def __init__(self, draw: Callable[..., Picture], controls: Mapping[str, Control], *, height: int = 0) -> None:
        self.draw, self.controls, self.height = draw, dict(controls), height
        self._drawn: dict[tuple[Any, ...], bytes] = {}

    @property
    def state(self) -> dict[str, Any]:
        """Default values of all controls."""
        return {name: control.default for name, control in self.controls.items()}

    def figure(self, **changes: Any) -> Picture:
        """The picture of the default state with ``changes``."""
        return self.draw(**{**self.state, **changes})

    def png(self, **changes: Any) -> bytes:
        """PNG of :meth:`figure`; states drawn before are not drawn again."""
        key = tuple({**self.state, **changes}.values())
        if key not in self._drawn:
            if len(self._drawn) >= CACHED_STATES:
                self._drawn.pop(next(iter(self._drawn)))
            self._drawn[key] = figures.png(self.figure(**changes))
        return self._drawn[key]

    def widget(self) -> ipywidgets.VBox:
        """Controls, one line for messages and the image. Its ``children`` are (controls, message, image)."""
        import ipywidgets

        fields = {name: _field(control) for name, control in self.controls.items()}
        first = self.png()
        width, height = png_size(first)
        image = ipywidgets.Image(value=first, format="png", layout=_fixed(width, max(height, self.height)))
        message = ipywidgets.HTML()

        def redraw(_: object) -> None:
            try:
                image.value = self.png(**{name: field.value for name, field in fields.items()})
                message.value = ""
            except Exception as error:  # an error in a callback would vanish in the server's log
                text = str(error) if isinstance(error, GolfbookError) else f"{type(error).__name__}: {error}"
                message.value = text.replace("&", "&amp;").replace("<", "&lt;")

        for field in fields.values():
            field.observe(redraw, names="value")
        controls = ipywidgets.HBox(list(fields.values()), layout=ipywidgets.Layout(flex_flow="row wrap"))
        return ipywidgets.VBox([controls, message, image])


def interactive() -> bool:
    """Whether someone can move controls: see the module's docstring."""
    setting = os.environ.get("GOLFBOOK_STATIC", "")
    if setting:
        return setting == "0"
    try:
        import ipywidgets  # noqa: F401
        from IPython import get_ipython
    except ImportError:
        return False
    kernel = getattr(get_ipython(), "kernel", None)
    return bool(getattr(kernel, "_allow_stdin", False))


def show(panel: Panel) -> None:
    """Show a panel with its controls, or the picture of its default state where nobody can move them."""
    if interactive():
        _display_widget(panel.widget(), panel.png())
    else:
        _display_png(panel.png())


def play(frames: Sequence[Callable[[], Picture]], milliseconds: Sequence[int]) -> None:
    """Show an animation as a GIF, or only its last frame where nobody watches: that is drawn alone, which is quick."""
    if not interactive():
        _display_png(figures.png(frames[-1]()))
        return
    from IPython.display import Image, display

    display(Image(data=figures.gif([frame() for frame in frames], milliseconds), format="gif"))


def tokens(tokenizer: Tokenizer, text: str) -> Panel:
    """Type a text, see its pieces and the bytes of each."""

    def draw(text: str) -> Picture:
        ids = tokenizer.encode_document(text)
        return text_plots.tokens([tokenizer.piece(i) for i in ids[1:]], tokenizer.token_bytes(ids).tolist())

    return Panel(draw, {"text": Text("text", text)}, height=320)


def losses(model: GPT, tokenizer: Tokenizer, text: str) -> Panel:
    """Type a text, see what predicting each token costs the model in nats."""

    def draw(text: str) -> Picture:
        ids = tokenizer.encode_document(text)
        pieces, sizes = [tokenizer.piece(i) for i in ids[1:]], tokenizer.token_bytes(ids).tolist()
        if not pieces:
            return text_plots.tokens([], [], [])
        nats = scoring.score(model, ids, window=len(pieces), stride=len(pieces))
        return text_plots.tokens(pieces, sizes, nats.tolist())

    return Panel(draw, {"text": Text("text", text)}, height=320)


def windows(targets: int, window: int, stride: int = 0) -> Panel:
    """Choose a stride, see which window scores which target with how much context."""
    strides = [window >> k for k in range(7) if window >> k]

    def draw(stride: int) -> Picture:
        plan = scoring.plan_windows(targets, window, stride)
        return text_plots.windows(plan.starts, plan.first, plan.stop, window=window, targets=targets)

    choices = sorted({*strides, stride or strides[0]})
    start = stride or strides[min(2, len(strides) - 1)]
    return Panel(draw, {"stride": Choice("stride", start, {str(s): s for s in choices})}, height=400)


def schedule(train: TrainConfig) -> Panel:
    """Change the schedules of a training configuration and see them: rates, momentum, averaging, QAT, the clock.

    ``fits`` only matters by the clock: it is how many steps the time is enough for, so a smaller one is a slower
    machine. Where the configuration has no ``max_seconds``, the time is a second for each of its steps.
    """

    def draw(clock: bool, fits: float, **changes: Any) -> Picture:
        seconds = (train.max_seconds or float(train.steps)) if clock else 0.0
        return figures.schedule(
            train.model_copy(update={**changes, "max_seconds": seconds}), seconds / fits if clock else None
        )

    step = max(1, train.steps // 20)
    decays = {f"{d:g}" if d else "off": d for d in sorted({0.0, 0.9, 0.98, 0.99, 0.997, train.ema_decay})}
    every = {str(n): n for n in sorted({1, 2, 5, 10, 20, 50, train.swa_every})}
    return Panel(
        draw,
        {
            "warmdown_steps": Slider("warmdown steps", min(train.warmdown_steps, train.steps), 0, train.steps, step),
            "warmdown_shape": Choice("shape", train.warmdown_shape, {"linear": "linear", "cosine": "cosine"}),
            "min_lr_scale": Slider("ends at", train.min_lr_scale, 0.0, 0.95, 0.05),
            "lr_warmup_steps": Slider("LR warm-up", min(train.lr_warmup_steps, train.steps), 0, train.steps, step),
            "muon_momentum_warmup_steps": Slider(
                "momentum warm-up", min(train.muon_momentum_warmup_steps, train.steps), 0, train.steps, step
            ),
            "averaging": Choice(
                "average", train.averaging, {"none": "none", "EMA": "ema", "SWA": "swa", "SWA of EMA": "swa_of_ema"}
            ),
            "ema_decay": Choice("EMA decay", train.ema_decay, decays),
            "swa_start": Slider("SWA below", train.swa_start, 0.0, 0.95, 0.05),
            "swa_every": Choice("snapshot every", train.swa_every, every),
            "qat_start": Slider("QAT below", train.qat_start, 0.0, 0.95, 0.05),
            "clock": Switch("stop by the clock", bool(train.max_seconds)),
            "fits": Slider("steps that fit", train.steps, max(1, train.steps // 4), train.steps, step),
        },
    )


def clip_quantize(weight: Tensor, bits: int, clip: float, scale_floor: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise a float32 matrix with rows clipped at the quantile ``clip`` of ``|w|`` (1: row maximum; 0: the search).

    Returns int8 integers (rows, columns) and float16 scales (rows,), by :func:`rowwise.quantize_matrix`.
    """
    if not clip:
        return rowwise.quantize_matrix(weight, bits, clip_search=True, scale_floor=scale_floor)
    bound = weight.abs().quantile(clip, dim=1, keepdim=True)
    clipped = weight.clamp(-bound, bound)  # the row maximum of a clipped row is its bound
    return rowwise.quantize_matrix(clipped, bits, clip_search=False, scale_floor=scale_floor)


def bits_and_clip(weight: Tensor, name: str, *, bits: int = 6) -> Panel:
    """Choose bits, clip and floor for one matrix; see its grid, its integers, and error, entropy and bytes."""
    weight = weight.detach().float()

    def draw(bits: int, clip: float, scale_floor: bool) -> Picture:
        q, scale = clip_quantize(weight, int(bits), clip, scale_floor)
        decoded = q.float() * scale.float()[:, None]
        return size_plots.quantization(
            weight.numpy(), q.numpy(), decoded.numpy(), bits=int(bits), scale=float(scale[0]), name=name
        )

    clips = {"published search": 0.0, "row maximum": 1.0, "0.999 quantile": 0.999, "0.99 quantile": 0.99}
    return Panel(
        draw,
        {
            "bits": Slider("bits", bits, 3, 8),
            "clip": Choice("clip", 1.0, clips),
            "scale_floor": Switch("published scale floor", False),
        },
    )


def bits_choice(table: pd.DataFrame, *, bits: int = 6) -> Panel:
    """Move through a table of whole models with 3, 4, ... bits: error, artifact bytes and score."""
    low, high = int(table["bits"].min()), int(table["bits"].max())
    return Panel(lambda bits: size_plots.bits_choice(table, int(bits)), {"bits": Slider("bits", bits, low, high)})


def seeds_needed(difference: float, std: float) -> Panel:
    """Choose a difference and a spread, see how many paired seeds would show it. Both start at measured values."""
    unit = 10 ** np.floor(np.log10(max(std, difference, 1e-4)))  # so that the sliders reach from fine to coarse
    step, high = float(unit / 20), float(unit * 10)

    def on_scale(value: float) -> float:
        return float(min(max(round(value / step), 1) * step, high))

    return Panel(
        lambda difference, std: figures.seeds_needed(difference, std),
        {
            "difference": Slider("difference (BPB)", on_scale(difference), step, high, step),
            "std": Slider("std of differences (BPB)", on_scale(std), step, high, step),
        },
    )


def training_monitor(
    run: Run, *, unigram_bpb: float | None = None, seconds: float = 10.0
) -> Callable[[Sequence[Mapping[str, Any]]], None]:
    """A callback for ``training.follow``: one live picture, or where nobody watches, one line every ``seconds``.

    The callback takes the metric points of the run so far. It must be called from the main thread of the kernel, as
    ``follow`` does: output from other threads ends up under the wrong cell.
    """
    if interactive():
        return _live_picture(run, unigram_bpb)
    return _log_lines(run, seconds)


def attach(run: Run, *, unigram_bpb: float | None = None) -> Picture:
    """The training curve of a running or finished run, from what is on the disk now."""
    result = run.read_result("training") or {}
    return figures.training_curve(
        run.read_metrics(),
        steps=run.config.train.steps,
        unigram_bpb=unigram_bpb if unigram_bpb is not None else result.get("unigram_bpb"),
        title=f"{run.variant}, seed {run.config.seed}",
    )


def _live_picture(run: Run, unigram_bpb: float | None) -> Callable[[Sequence[Mapping[str, Any]]], None]:
    import ipywidgets

    first = figures.png(attach(run, unigram_bpb=unigram_bpb))
    image = ipywidgets.Image(value=first, format="png", layout=_fixed(*png_size(first)))
    _display_widget(image, None)
    drawn = {"at": time.monotonic(), "points": 0}

    def update(metrics: Sequence[Mapping[str, Any]]) -> None:
        last = max((p["step"] for p in metrics), default=0) >= run.config.train.steps
        if len(metrics) == drawn["points"] or (time.monotonic() - drawn["at"] < REDRAW_SECONDS and not last):
            return
        image.value = figures.png(attach(run, unigram_bpb=unigram_bpb))
        drawn.update(at=time.monotonic(), points=len(metrics))

    return update


def _log_lines(run: Run, seconds: float) -> Callable[[Sequence[Mapping[str, Any]]], None]:
    said = {"at": -np.inf, "step": -1.0}

    def update(metrics: Sequence[Mapping[str, Any]]) -> None:
        if not metrics or time.monotonic() - said["at"] < seconds or metrics[-1]["step"] == said["step"]:
            return
        said.update(at=time.monotonic(), step=metrics[-1]["step"])
        print(progress_line(metrics, run.config.train.steps), flush=True)

    return update


def progress_line(metrics: Sequence[Mapping[str, Any]], steps: int) -> str:
    """One line that says how far a training run is, from its metric points."""
    train = [p for p in metrics if p["kind"] == "train"]
    validation = [p for p in metrics if p["kind"] == "validation"]
    parts = [f"step {metrics[-1]['step']}/{steps}"]
    if train:
        parts += [f"loss {train[-1]['loss']:.3f} nats/token", figures.speed_line(train[-1])]
    if validation:
        parts.append(f"validation {validation[-1]['val_bpb']:.3f} bits/byte at step {validation[-1]['step']}")
    return ", ".join(parts)


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels of a PNG."""
    width, height = struct.unpack(">II", data[16:24])
    return int(width), int(height)


def _fixed(width: int, height: int) -> ipywidgets.Layout:
    import ipywidgets

    return ipywidgets.Layout(
        width=f"{width}px", height=f"{height}px", max_width="100%", object_fit="scale-down", object_position="left top"
    )


def _field(control: Control) -> Any:
    import ipywidgets

    style = {"description_width": "initial"}
    if isinstance(control, Slider):
        whole = all(float(x).is_integer() for x in (control.default, control.low, control.high, control.step))
        kind, cast = (ipywidgets.IntSlider, int) if whole else (ipywidgets.FloatSlider, float)
        return kind(
            value=cast(control.default),
            min=cast(control.low),
            max=cast(control.high),
            step=cast(control.step),
            description=control.label,
            continuous_update=False,
            style=style,
            **({} if whole else {"readout_format": ".4f"}),
        )
    if isinstance(control, Choice):
        return ipywidgets.Dropdown(
            options=list(control.options.items()), value=control.default, description=control.label, style=style
        )
    if isinstance(control, Switch):
        return ipywidgets.Checkbox(value=control.default, description=control.label, indent=False)
    return ipywidgets.Text(
        value=control.default,
        description=control.label,
        continuous_update=False,
        style=style,
        layout=ipywidgets.Layout(width="90%"),
    )


def _display_png(data: bytes) -> None:
    from IPython.display import Image, display

    display(Image(data=data, format="png"))


def _display_widget(widget: Any, static: bytes | None) -> None:
    """Display a widget; viewers that know no widgets find the picture in the same output and show that."""
    from IPython.display import display

    bundle = dict(widget._repr_mimebundle_())
    if static is not None:
        bundle["image/png"] = base64.b64encode(static).decode()
    display(bundle, raw=True)
