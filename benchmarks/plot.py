"""Draw the results: `python benchmarks/plot.py results.json [--out docs/performance.svg]`; .png works as well.

matplotlib gets its own environment, beside those of the peers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

from harness import envs

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "docs" / "performance.svg"
PACKAGES = ("matplotlib",)
PANELS = (
    ("submit_per_s", "submitted a second", "longer is better"),
    ("drain_per_s", "finished a second", "longer is better"),
    ("start_p50_ms", "ms from submit to start, p50", "shorter is better"),
)
COLOURS = {"ours": "#1f6feb", "earlier": "#8250df", "bare": "#c9ced6", "peer": "#6e7781"}


def kind(name: str) -> str:
    """Return the colour of an entry."""
    if name.startswith("buquet-0.1"):
        return "earlier"
    return "ours" if name.startswith("buquet") else "bare" if name.startswith("bare") else "peer"


def draw(document: dict[str, Any], out: Path) -> None:
    """Draw one panel per figure, with the entries below each other in the order of the file."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"font.size": 9, "svg.hashsalt": "buquet", "svg.fonttype": "none", "axes.spines.top": False}
    from matplotlib import pyplot as plt

    results = sorted(document["results"], key=lambda result: list(COLOURS).index(kind(result["name"])))[::-1]
    figure, axes = plt.subplots(1, len(PANELS), sharey=True, figsize=(13, 0.34 * len(results) + 1.4), layout="constrained")
    for axis, (key, title, hint) in zip(axes, PANELS, strict=True):
        values = [result.get(key) or 0 for result in results]
        bars = axis.barh([result["label"] for result in results], values, color=[COLOURS[kind(r["name"])] for r in results])
        axis.bar_label(bars, [f" {value:,.0f}" if value >= 10 else f" {value:.1f}" if value else "" for value in values])
        axis.set_xscale("log")
        axis.set_xlim(left=1, right=max([10, *values]) * 6)
        axis.set_title(f"{title}\n{hint}, log scale", fontsize=9, loc="left")
        axis.tick_params(axis="y", length=0)
        axis.spines[["right", "left"]].set_visible(False)
    machine = document["machine"]
    note = f"no-op tasks, {machine['cores']} cores ({machine['cpu']}), Python {machine['python']}, {machine['date']}"
    figure.supxlabel(note, fontsize=8, color="#57606a")
    figure.savefig(out, dpi=150, metadata={"Date": None} if out.suffix == ".svg" else None)


def run(results: Path, out: Path, folder: Path) -> None:
    """Draw in an environment that has matplotlib."""
    python = envs.environment(folder, "plot", PACKAGES)
    subprocess.run([str(python), __file__, str(results), "--out", str(out)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what compare.py wrote with --out")
    parser.add_argument("--out", type=Path, default=PLACE)
    parser.add_argument("--envs", type=Path, default=ROOT / ".benchmarks", help="folder of the virtual environments")
    given = parser.parse_args()
    if importlib.util.find_spec("matplotlib") is None:
        run(given.results, given.out, given.envs)
        return
    given.out.parent.mkdir(parents=True, exist_ok=True)
    draw(json.loads(given.results.read_text()), given.out)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
