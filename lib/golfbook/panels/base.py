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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from golfbook.errors import GolfbookError
from golfbook.plots import style
from golfbook.plots.style import Picture

if TYPE_CHECKING:
    import ipywidgets

CACHED_STATES = 64


@dataclass(frozen=True)
class Slider:
    """Ask for a number from ``low`` to ``high``."""

    label: str
    default: float
    low: float
    high: float
    step: float = 1


@dataclass(frozen=True)
class Choice:
    """Ask for one of several values, each with its label."""

    label: str
    default: Any
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Text:
    """Ask for a line of text, taken over on Enter or when the field is left."""

    label: str
    default: str


@dataclass(frozen=True)
class Switch:
    """Ask for on or off."""

    label: str
    default: bool


Control = Slider | Choice | Text | Switch


class Panel:
    """Show controls around ``draw``, which maps the values of all controls to a picture.

    ``height`` is the least height of the image in pixels, for pictures whose height depends on their state.
    """

    def __init__(self, draw: Callable[..., Picture], controls: Mapping[str, Control], *, height: int = 0) -> None:
        self.draw, self.controls, self.height = draw, dict(controls), height
        self._drawn: dict[tuple[Any, ...], bytes] = {}

    @property
    def state(self) -> dict[str, Any]:
        """Return the default values of all controls."""
        return {name: control.default for name, control in self.controls.items()}

    def figure(self, **changes: Any) -> Picture:
        """Draw the default state with ``changes``."""
        return self.draw(**{**self.state, **changes})

    def png(self, **changes: Any) -> bytes:
        """Return the PNG of :meth:`figure`; states drawn before are not drawn again."""
        key = tuple({**self.state, **changes}.values())
        if key not in self._drawn:
            if len(self._drawn) >= CACHED_STATES:
                self._drawn.pop(next(iter(self._drawn)))
            self._drawn[key] = style.png(self.figure(**changes))
        return self._drawn[key]

    def widget(self) -> ipywidgets.VBox:
        """Return the widget, whose ``children`` are (controls, one line for messages, image)."""
        import ipywidgets

        fields = {name: _field(control) for name, control in self.controls.items()}
        first = self.png()
        width, height = png_size(first)
        image = ipywidgets.Image(value=first, format="png", layout=image_layout(width, max(height, self.height)))
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
        controls = ipywidgets.HBox(list(fields.values()), layout={"flex_flow": "row wrap"})
        return ipywidgets.VBox([controls, message, image])


def guessing(panel: Panel, question: Slider, truth: Callable[..., float]) -> Panel:
    """Return ``panel`` with one more control, a guess; once it is moved, the picture also says guess and truth.

    ``truth`` maps the state of the panel to the number that was asked for.
    """

    def draw(guess: float, **state: Any) -> Picture:
        figure = panel.draw(**state)
        if guess != question.default:
            figure.supxlabel(f"your guess: {guess:,g}; it is {truth(**state):,.4g}", color=style.RED)
        return figure

    return Panel(draw, {"guess": question, **panel.controls}, height=panel.height)


def interactive() -> bool:
    """Return whether someone can move controls: see the module's docstring."""
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
        display_widget(panel.widget(), panel.png())
    else:
        display_png(panel.png())


def play(frames: Sequence[Callable[[], Picture]], milliseconds: Sequence[int]) -> None:
    """Show an animation as a GIF, or only its last frame where nobody watches: that is drawn alone, which is quick."""
    if not interactive():
        display_png(style.png(frames[-1]()))
        return
    from IPython.display import Image, display

    display(Image(data=style.gif([frame() for frame in frames], milliseconds), format="gif"))


def png_size(data: bytes) -> tuple[Any, ...]:
    """Return width and height in pixels of a PNG."""
    return struct.unpack(">II", data[16:24])


def image_layout(width: int, height: int) -> dict[str, str]:
    """Return the layout of an image of that many pixels, which shrinks with its cell."""
    size = {"width": f"{width}px", "height": f"{height}px", "max_width": "100%"}
    return size | {"object_fit": "scale-down", "object_position": "left top"}


def _field(control: Control) -> Any:
    import ipywidgets

    look: Any = {"value": control.default, "description": control.label, "style": {"description_width": "initial"}}
    if isinstance(control, Slider):
        numbers = {"value": control.default, "min": control.low, "max": control.high, "step": control.step}
        whole = all(float(x).is_integer() for x in numbers.values())
        look |= {key: int(x) if whole else float(x) for key, x in numbers.items()}
        look["layout"] = {"width": f"{300 + 7 * len(control.label)}px"}  # a long label leaves room to slide
        if whole:
            return ipywidgets.IntSlider(continuous_update=False, **look)
        return ipywidgets.FloatSlider(continuous_update=False, readout_format=".4f", **look)
    if isinstance(control, Choice):
        return ipywidgets.Dropdown(options=list(control.options.items()), **look)
    if isinstance(control, Switch):
        return ipywidgets.Checkbox(value=control.default, description=control.label, indent=False)
    return ipywidgets.Text(continuous_update=False, layout={"width": "90%"}, **look)


def display_png(data: bytes) -> None:
    from IPython.display import Image, display

    display(Image(data=data, format="png"))


def display_widget(widget: Any, static: bytes | None) -> None:
    """Show a widget; viewers that know no widgets find the picture in the same output and show that."""
    from IPython.display import display

    bundle = dict(widget._repr_mimebundle_())
    if static is not None:
        bundle["image/png"] = base64.b64encode(static).decode()
    display(bundle, raw=True)
