"""Drawings of runs: nothing is left out, nothing is crossed, and no name breaks them."""

import itertools
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buquet.insights.drawing import as_gantt, as_mermaid, as_svg, as_text, labels
from buquet.insights.drawing.layout import crossings, lay_out, order_of, settle
from buquet.insights.runview import RunView
from buquet.printing import printable
from buquet.workflow.handle import StepInfo

STATES = ("waiting", "ready", "running", "completed", "failed", "skipped", "stopped", "cancelled")
NOW = 1_700_000_060_000
SVG = "{http://www.w3.org/2000/svg}"
CHAIN = {"a": "", "b": "a", "c": "b", "d": "c"}
DIAMOND = {"a": "", "b": "a", "c": "a", "d": "b c"}
TWELVE = {
    "find": "",
    "csv": "find",
    "json": "find",
    "text": "find",
    "csv_2": "csv",
    "json_2": "json",
    "text_2": "text",
    "join": "csv_2 json_2 text_2",
    "sums": "join",
    "plots": "join",
    "load": "sums plots",
    "mail": "load",
}
PAST = {"a": "", "b": "a", "c": "b", "long": "a", "d": "c long", "e": "d"}
"""An edge, long -> d, that passes a layer."""
SHAPES = {"chain": CHAIN, "diamond": DIAMOND, "twelve": TWELVE, "past": PAST}


def run_of(depends, **more):
    return RunView(id="r", workflow="w", steps=[StepInfo(name=name, needs=tuple(on.split())) for name, on in depends.items()])


def plain(run, width=80):
    return ["".join(text for text, _ in line) for line in as_text(run, NOW, width)]


NAMES = st.text(min_size=1, max_size=9) | st.sampled_from(("end", 'say "hi"', "[x] (y) {z}", "#35; <b>&", "名" * 40, "a" * 60))
FEW = settings(deadline=None, max_examples=40)


@st.composite
def graphs(draw):
    """Any order of some steps."""
    count = draw(st.integers(0, 16))
    return run_of(
        {
            f"s{i}": " ".join(f"s{j}" for j in draw(st.sets(st.integers(0, i - 1), max_size=3)) if i) if i else ""
            for i in range(count)
        }
    )


@st.composite
def runs(draw):
    """Any run: names of all kinds, steps that depend on earlier ones and sometimes on what does not exist."""
    names = draw(st.lists(NAMES, unique=True, max_size=9))
    steps = []
    for index, name in enumerate(names):
        depends = draw(st.lists(st.sampled_from(names[:index]), unique=True, max_size=3)) if index else []
        state = draw(st.sampled_from(STATES))
        step = StepInfo(
            name=name,
            kind=draw(st.sampled_from(("task", "each", "wait", "sleep"))),
            task=draw(NAMES),
            status=state,
            undo=draw(st.sampled_from(("", "due", "done", "failed"))),
            needs=(*depends, *draw(st.sampled_from(((), ("nowhere",), (name,))))),
            condition=draw(NAMES),
            started=draw(st.sampled_from((0, NOW - 60_000, NOW))),
            ended=draw(st.sampled_from((0, NOW + 5))),
            attempts=draw(st.integers(0, 3)),
            done=draw(st.integers(0, 10)),
            total=draw(st.integers(0, 10)),
            error=draw(NAMES),
        )
        steps.append(step)
    return RunView(id="r", workflow=draw(NAMES), error=draw(st.just("") | NAMES), steps=draw(st.permutations(steps)))


@given(runs(), st.integers(40, 120))
@FEW
def test_text_has_a_line_for_every_step_and_keeps_its_width(run, width):
    lines = plain(run, width)
    marks = set(labels.MARKS.values())
    graph = lines[2 if run.error else 1 :]
    rows = [line for line in graph if any(state in line and line.lstrip("│─┌└ ")[:1] in marks for state in STATES)]
    assert len(rows) == len(run.steps)
    assert all(labels.columns(line) <= width for line in lines)
    assert all(printable(line) == line for line in lines), "an error's escape sequences stay out of the terminal"


@given(runs())
@FEW
def test_pictures_are_xml_and_hold_every_step_by_its_name(run):
    for drawn in (as_svg(run, NOW, lambda step: f'/x?"<&{step.name}'), as_gantt(run, NOW)):
        root = ET.fromstring(drawn)  # noqa: S314 - our own
        assert {group.get("data-step") for group in root.iter(f"{SVG}g")} == {legal(step.name) for step in run.steps}


def legal(text):
    return printable(text, keep="\t\n\r", mark=lambda _: "\ufffd")


@given(runs())
@FEW
def test_mermaid_says_every_step_and_edge_in_its_grammar(run):
    """The grammar here is narrower than Mermaid's; its own parser has read such files."""
    head, *lines = as_mermaid(run, NOW).splitlines()
    assert head == "flowchart LR"
    label = r'"(?:[^"\W]|[ _,/=.():]|#\d+;|<br/>)*"'
    node = re.compile(rf"  s\d+(?:\[{label}\]|\[\[{label}\]\]|{{{{{label}}}}}|\(\[{label}\]\)):::[a-z]+")
    edge = re.compile(rf"  s\d+ (?:-->|-\.->)(?:\|{label}\|)? s\d+")
    rest = [line for line in lines if not line.startswith("  classDef ")]
    nodes = [line for line in rest if node.fullmatch(line)]
    edges = [line for line in rest if edge.fullmatch(line)]
    assert len(nodes) == len(run.steps)
    assert len(edges) == len(order_of(run.steps).edges)
    assert len(nodes) + len(edges) == len(rest), rest


@given(graphs())
@FEW
def test_order_keeps_all_that_was_to_be_known(run):
    order = order_of(run.steps)
    names = list(order.steps)
    reach = {}
    for name in names:
        reach[name] = set().union(*({each} | reach[each] for each in order.before[name]))
        wanted = {each for each in order.steps[name].needs if each in order.steps and each != name}
        assert wanted <= reach[name], "left out are only those that follow from others"
        assert all(names.index(each) < names.index(name) for each in order.before[name])


def test_a_circle_is_drawn_all_the_same():
    run = run_of({"a": "c", "b": "a", "c": "b", "d": "c"})
    assert len(order_of(run.steps).steps) == 4
    assert ET.fromstring(as_svg(run, NOW)) is not None  # noqa: S314 - our own
    assert len([line for line in plain(run) if "○" in line]) == 4


def boxes_and_edges(run):
    """Each box's corners, and each edge's line as points close together."""
    root = ET.fromstring(as_svg(run, NOW))  # noqa: S314 - our own
    boxes = {}
    for group in root.iter(f"{SVG}g"):
        box = next(each for each in group.iter(f"{SVG}rect") if each.get("class") == "box")
        x, y, width, height = (float(box.get(name)) for name in ("x", "y", "width", "height"))
        boxes[group.get("data-step")] = (x, y, x + width, y + height)
    edges = {
        (path.get("data-from"), path.get("data-to")): points(path.get("d"))
        for path in root.iter(f"{SVG}path")
        if path.get("data-from")
    }
    return boxes, edges


def points(path):
    found = []
    for command, text in re.findall(r"([MLC]) ([-\d. ]+)", path):
        numbers = [float(each) for each in text.split()]
        ends = list(zip(numbers[::2], numbers[1::2], strict=True))
        if command == "M":
            found += ends
            continue
        start, last = found[-1], ends[-1]
        one, two = ends[:2] if command == "C" else (start, last)
        for step in range(1, 41):
            t, u = step / 40, 1 - step / 40
            weights = (u**3, 3 * u * u * t, 3 * u * t * t, t**3)
            found.append(
                tuple(sum(w * p[axis] for w, p in zip(weights, (start, one, two, last), strict=True)) for axis in (0, 1))
            )
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_touch_no_box_but_their_own(shape):
    run = run_of(SHAPES[shape])
    boxes, edges = boxes_and_edges(run)
    assert set(edges) == set(order_of(run.steps).edges)
    for ends, line in edges.items():
        for name, (left, top, right, bottom) in boxes.items():
            inside = [(x, y) for x, y in line if left < x < right and top < y < bottom]
            assert not inside, f"{ends} through {name}"
            if name in ends:
                nearest = min(max(left - x, x - right, 0) + max(top - y, y - bottom, 0) for x, y in line)
                assert nearest <= 8, f"{ends} ends at {name}"


@given(graphs())
@FEW
def test_boxes_lie_apart_and_on_the_paper(run):
    boxes, _ = boxes_and_edges(run)
    root = ET.fromstring(as_svg(run, NOW))  # noqa: S314 - our own
    width, height = float(root.get("width")), float(root.get("height"))
    for a, b in itertools.combinations(boxes.values(), 2):
        assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
    for left, top, right, bottom in boxes.values():
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_shapes_are_laid_out_without_crossings(shape):
    order = order_of(run_of(SHAPES[shape]).steps)
    layout = lay_out(order, 40, 10, 5)
    below = {node: [] for layer in layout.layers for node in layer}
    for nodes in layout.edges.values():
        for upper, lower in itertools.pairwise(nodes):
            below[upper].append(lower)
    assert crossings(layout.layers, below) == 0


def test_what_can_be_untangled_is():
    """As the workflow names the steps, all four edges cross."""
    order = order_of(run_of({"a": "", "b": "", "c": "b", "d": "a", "e": "c", "f": "d"}).steps)
    layout = lay_out(order, 40, 10, 5)
    names = [[name for name, _, _ in layer] for layer in layout.layers]
    assert names in ([["a", "b"], ["d", "c"], ["f", "e"]], [["b", "a"], ["c", "d"], ["e", "f"]])


def test_a_chain_is_straight():
    layout = lay_out(order_of(run_of(CHAIN).steps), 40, 10, 5)
    assert len({round(place, 3) for place in layout.at.values()}) == 1


@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(0.1, 10)), min_size=1, max_size=9), st.data())
def test_settled_places_keep_their_room_and_move_no_more_than_they_must(wanted, data):
    rooms = data.draw(st.lists(st.floats(0, 50), min_size=len(wanted) - 1, max_size=len(wanted) - 1))
    places = settle(wanted, rooms)
    assert all(b - a >= room - 1e-6 for (a, b), room in zip(itertools.pairwise(places), rooms, strict=True))

    def cost(found):
        return sum(weight * (place - want) ** 2 for place, (want, weight) in zip(found, wanted, strict=True))

    spread = [min(want for want, _ in wanted) + sum(rooms[:index]) for index in range(len(wanted))]
    assert cost(places) <= cost(spread) + 1e-3, "no worse than another allowed way"


def test_text_of_a_diamond_as_people_know_it():
    assert plain(run_of(DIAMOND)) == [
        "w r: pending",
        "○    a  waiting",
        "├─╮",
        "○ │  b  waiting",
        "│ ○  c  waiting",
        "├─╯",
        "○    d  waiting",
    ]


def test_lines_that_are_passed_stay_whole():
    """The line from d to e passes that to g, which also waits for f."""
    lines = plain(run_of({"a": "", "b": "a", "c": "a", "d": "a", "e": "b d", "f": "", "g": "c f"}))
    assert lines[1:] == [
        "○      a  waiting",
        "├─┬─╮",
        "○ │ │  b  waiting",
        "│ ○ │  c  waiting",
        "│ │ ○  d  waiting",
        "├─│─╯",
        "○ │    e  waiting",
        "  │ ○  f  waiting",
        "  ├─╯",
        "  ○    g  waiting",
    ]


def test_a_line_goes_on_over_a_lane_that_has_ended():
    lines = plain(run_of({"a": "", "b": "a", "c": "a", "d": "a", "e": "b d"}))
    assert lines[4:] == ["│ ○ │  c  waiting", "│   ○  d  waiting", "├───╯", "○      e  waiting"]


def test_what_has_no_tie_does_not_stand_right_below():
    lines = plain(run_of({"a": "", "b": "", "c": "b"}))
    assert lines[1:] == ["○  a  waiting", "", "○  b  waiting", "○  c  waiting"]


def test_more_than_people_can_follow_is_listed_by_layers():
    parts = {f"part_{index}": "list" for index in range(58)}
    lines = plain(run_of({"list": "", **parts, "join": " ".join(parts)}))
    assert len(lines) == 61, "a line a step"
    assert lines[1].startswith("─ ○  list")
    assert lines[2].startswith("┌ ○  part_0")
    assert lines[3].startswith("│ ○  part_1")
    assert lines[59].startswith("└ ○  part_57")


def test_what_people_ask_first_stands_on_the_line():
    steps = [
        StepInfo(name="label", kind="each", status="running", started=NOW - 130_000, done=120, total=5000),
        StepInfo(name="pay", status="failed", started=NOW - 3000, ended=NOW - 500, error="Refused: no\x1b[31m money", attempts=3),
        StepInfo(name="ship", needs=("pay",), condition="ok.granted == true", reason="no live worker has a handler for 'ship'"),
    ]
    text = "\n".join(plain(RunView(id="r", workflow="w", status="running", started=NOW - 130_000, steps=steps), 120))
    for said in (
        "w r: running, 2 min 10 s",
        "120/5,000",
        "Refused: no [31m money · attempt 3",
        "2.5 s",
        "no live worker has a handler",
    ):
        assert said in text
    drawn = as_svg(RunView(id="r", workflow="w", steps=steps), NOW)
    for said in ("120/5,000", "2.5 s", "ok.granted == true", "Refused: no [31m money"):
        assert said in drawn


def test_a_link_is_where_the_page_says():
    steps = [StepInfo(name="a", task_id="t1"), StepInfo(name="b")]
    drawn = as_svg(RunView(id="r", workflow="w", steps=steps), NOW, lambda step: f"/tasks/{step.task_id}" if step.task_id else "")
    root = ET.fromstring(drawn)  # noqa: S314 - our own
    (link,) = root.iter(f"{SVG}a")
    (group,) = link.iter(f"{SVG}g")
    assert (link.get("href"), group.get("data-step"), group.get("data-task")) == ("/tasks/t1", "a", "t1")
    assert "<script" not in as_svg(RunView(id="r", workflow="<script>", steps=[StepInfo(name="<script>")]), NOW)
