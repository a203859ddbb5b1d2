"""Some hundred seeds of the simulation, and that a seed decides everything."""

import asyncio
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.simulation import planted

import buquet
from buquet.testing.simulation import simulate
from buquet.testing.simulation.cli import many
from buquet.testing.virtual import VirtualLoop

SEEDS = 300
QUICK = (
    "earlydrop",
    "finish before the run's record",
    "gap trusted",
    "hbdel=lookup",
    "no write id",
    "nofence",
    "undo not awaited",
)
"""Bugs that take few seeds."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hundreds_of_seeds_find_nothing():
    found = [
        f"buquet-sim --seed {outcome.seed} --trace: {outcome.findings[0]}"
        for outcome in many(0, SEEDS, jobs=os.cpu_count() or 1)
        if outcome.findings
    ]
    assert not found, "\n".join(found)


def test_the_same_seed_gives_the_same_trace():
    assert simulate(5).hash == simulate(5).hash
    assert simulate(5).hash != simulate(6).hash


def test_the_same_seed_gives_the_same_trace_in_other_processes_whatever_their_hash_seed_and_wherever_the_code_lies(tmp_path):
    elsewhere = tmp_path / "in-a-folder-of-another-name"
    shutil.copytree(Path(buquet.__file__).parent, elsewhere / "buquet", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import json; from buquet.testing.simulation import simulate as s; print(json.dumps([s(n).hash for n in range(15)]))"
    hashes = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
                capture_output=True,
                check=True,
                text=True,
            ).stdout
        )
        for seed, path in (("1", os.environ.get("PYTHONPATH", "")), ("2", str(elsewhere)))
    ]
    assert hashes[0] == hashes[1]


def test_a_finding_prints_the_command_that_repeats_it(capsys, monkeypatch):
    import typer

    from buquet.testing.simulation import cli
    from buquet.testing.simulation.play import SeedResult

    monkeypatch.setattr(cli, "simulate", lambda seed: SeedResult(seed, "", ["I1: it is lost"] if seed == 4 else []))
    with pytest.raises(typer.Exit) as ended:
        cli.run(seeds=5, start=2)
    assert ended.value.exit_code == 1
    assert "buquet-sim --seed 4 --trace" in capsys.readouterr().out


def test_trace_hashes_are_recorded_once_and_compared_from_then_on(capsys, monkeypatch, tmp_path):
    import typer

    from buquet.testing.simulation import cli
    from buquet.testing.simulation.play import SeedResult

    path = tmp_path / "hashes.txt"

    def play(changed=(), **options):
        monkeypatch.setattr(cli, "simulate", lambda seed: SeedResult(seed, f"{seed}{'b' if seed in changed else 'a'}"))
        with pytest.raises(typer.Exit) as ended:
            cli.run(**{"seeds": 4, "start": 2, "hashes": path, **options})
        return ended.value.exit_code, capsys.readouterr().out

    assert play()[0] == 0
    assert path.read_text() == "2 2a\n3 3a\n4 4a\n5 5a\n"
    assert play()[0] == 0
    assert play(seeds=2)[0] == 0, "some of the recorded seeds can be compared alone"
    code, out = play(changed=(3, 5))
    assert code == 1
    assert "2 of 4 seeds have another trace hash" in out
    assert out.endswith(": 3, 5\n")
    assert play(seeds=5, as_json=True)[1].endswith('{"other_hash": [6]}\n'), "a seed that is not recorded differs"
    assert path.read_text().startswith("2 2a\n3 3a\n"), "a recorded file is not written again"


def test_ctrl_c_ends_it_with_a_summary_and_without_a_traceback():
    command = [sys.executable, "-m", "buquet.testing.simulation.cli", "--seeds", "100000", "--jobs", "2"]
    sim = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        sim.stderr.readline()  # the first line of progress: all its processes are at work
        os.killpg(sim.pid, signal.SIGINT)
        out, err = sim.communicate(timeout=60)
    finally:
        sim.kill()
    assert sim.returncode == 130
    assert out.endswith("and stopped\n")
    assert "Traceback" not in err


@pytest.mark.parametrize("bug", planted.BUGS)
def test_a_planted_bug_takes_the_place_of_what_is_there(bug):
    for owner, attribute, wrong in planted.BUGS[bug][1]:
        good = getattr(owner, attribute)
        assert inspect.iscoroutinefunction(good) == inspect.iscoroutinefunction(wrong)
        assert len(inspect.signature(good).parameters) == len(inspect.signature(wrong).parameters)


@pytest.mark.slow
@pytest.mark.parametrize("bug", QUICK)
def test_a_planted_bug_is_found(bug):
    """The whole table is by `make planted`; these are found by their first seeds."""
    outcome = planted.hunt(bug, most=40)
    assert outcome["found"], f"not found in {outcome['tried']} seeds"


def test_what_goes_round_without_end_is_told():
    loop = VirtualLoop()

    def again():
        loop.call_soon(again)

    async def waits_for_nothing():
        again()
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="no time has passed"):
        loop.run_until_complete(waits_for_nothing())
