"""Workflow runs, drawn: as text, Mermaid, and SVG. Pure functions: from a `RunView` and a time to text."""

from buquet.insights.drawing.svg import as_gantt as as_gantt
from buquet.insights.drawing.svg import as_svg as as_svg
from buquet.insights.drawing.text import as_mermaid as as_mermaid
from buquet.insights.drawing.text import as_text as as_text
