"""The pieces of SVG that both pictures of a run are made of, and their colours.

Colours are CSS variables on the root's class `bq`, so that a page can set its own (`.bq { --bq-completed: … }`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from xml.sax.saxutils import quoteattr

from buquet.insights.drawing import words
from buquet.printing import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from buquet.insights.runview import StepView

STATES = ("waiting", "ready", "running", "completed", "failed", "skipped", "stopped", "cancelled")
LIGHT = {
    "paper": "#ffffff",
    "ink": "#1f2328",
    "faint": "#59636e",
    "line": "#8c959f",
    "grid": "#d8dee4",
    "waiting": "#8c959f",
    "ready": "#bf8700",
    "running": "#0969da",
    "completed": "#1a7f37",
    "failed": "#cf222e",
    "skipped": "#8c959f",
    "stopped": "#bc4c00",
    "cancelled": "#8250df",
}
DARK = {
    "paper": "#0d1117",
    "ink": "#f0f6fc",
    "faint": "#9198a1",
    "line": "#7d8590",
    "grid": "#2f353d",
    "waiting": "#7d8590",
    "ready": "#d29922",
    "running": "#58a6ff",
    "completed": "#3fb950",
    "failed": "#f85149",
    "skipped": "#7d8590",
    "stopped": "#f0883e",
    "cancelled": "#ab7df8",
}
RULES = """
.bq{color-scheme:light dark;font-family:ui-sans-serif,system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;font-size:11px}
.bq .paper{fill:var(--bq-paper)}
.bq text{fill:var(--bq-ink)}
.bq .name{font-size:13px;font-weight:600}
.bq .faint,.bq .skipped .name,.bq .waiting .name{fill:var(--bq-faint)}
.bq .box{fill:var(--c);fill-opacity:.1;stroke:var(--c);stroke-width:1.4}
.bq .under{fill:none;stroke:var(--c);stroke-width:1.4}
.bq .fill{fill:var(--c)}
.bq .mark{fill:var(--c);font-size:14px;font-weight:700}
.bq .skipped .box,.bq .edge.skipped{stroke-dasharray:5 4}
.bq .failed .said{fill:var(--c)}
.bq .edge{fill:none;stroke:var(--bq-line);stroke-width:1.4}
.bq .tip{fill:var(--bq-line)}
.bq .edge.taken{stroke:var(--bq-ink)}
.bq .tip.taken{fill:var(--bq-ink)}
.bq .condition{fill:var(--bq-faint);font-style:italic}
.bq .condition{stroke:var(--bq-paper);stroke-width:4;stroke-linejoin:round;paint-order:stroke}
.bq .grid{stroke:var(--bq-grid)}
.bq .bar{fill:var(--c)}
.bq .bar.idle{fill-opacity:.35}
.bq a:hover .box,.bq a:focus .box{fill-opacity:.25}
"""


def _style() -> str:
    light = ";".join(f"--bq-{name}:{colour}" for name, colour in LIGHT.items())
    dark = ";".join(f"--bq-{name}:{colour}" for name, colour in DARK.items())
    states = "\n".join(f".bq .{state}{{--c:var(--bq-{state})}}" for state in STATES)
    return f":where(.bq){{{light}}}\n@media(prefers-color-scheme:dark){{:where(.bq){{{dark}}}}}{RULES}{states}\n"


STYLE = _style()


class Tag(NamedTuple):
    """An element of SVG under way: its name and attributes, already as text."""

    name: str
    attributes: str

    def around(self, *inside: str) -> str:
        """Return the element with what is in it; "" inside makes it empty."""
        body = "".join(inside)
        return f"<{self.name}{self.attributes}>{body}</{self.name}>" if body else f"<{self.name}{self.attributes}/>"


def tag(name: str, **attributes: object) -> Tag:
    r"""Return an element. `class_` is `class`, an underscore is a hyphen; numbers lose needless digits; all values are escaped.

    >>> tag("rect", class_="box", rx=6.0, data_step='a"<b').around()
    '<rect class="box" rx="6" data-step=\'a"&lt;b\'/>'
    """
    return Tag(name, "".join(f" {key.rstrip('_').replace('_', '-')}={_quoted(value)}" for key, value in attributes.items()))


def _quoted(value: object) -> str:
    if isinstance(value, float):
        return f'"{value:.1f}"'.replace('.0"', '"')
    return quoteattr(legal(str(value)))


def legal(text: str) -> str:
    """Return a text with what XML cannot hold replaced."""
    return printable(text, keep="\t\n\r", mark=lambda _: "\ufffd")


def escaped(text: str) -> str:
    """Return a text as the inside of an element."""
    return legal(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def write(x: float, y: float, text: str, **attributes: object) -> str:
    """Return a text element; "" for an empty text."""
    return tag("text", x=x, y=y, **attributes).around(escaped(text)) if text else ""


def hooked(step: StepView, link: Callable[[StepView], str] | None, inside: Iterable[str], now: int) -> str:
    """Return a step's group with what a page can hold on to: `data-step`, `data-task`, and `<a>` where `link` has an address."""
    group = tag("g", class_=f"step {step.state}", data_step=step.name, data_task=step.task_id)
    said = [words.plain(words.title(step)), ", ".join(each for each in (step.state, words.time(step, now)) if each)]
    drawn = group.around(tag("title").around(escaped("\n".join([*said, *words.remarks(step)]))), *inside)
    address = link(step) if link else ""
    return tag("a", href=address).around(drawn) if address else drawn


def picture(width: float, height: float, label: str, inside: Iterable[str]) -> str:
    """Return a whole SVG document, which can also be put into a page as it is."""
    root = tag(
        "svg",
        xmlns="http://www.w3.org/2000/svg",
        class_="bq",
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=f"{width:.0f}",
        height=f"{height:.0f}",
        role="img",
        aria_label=words.plain(label),
    )
    paper = tag("rect", class_="paper", width=f"{width:.0f}", height=f"{height:.0f}").around()
    return root.around(tag("style").around(STYLE), paper, *inside) + "\n"
