#!/usr/bin/env pypy3
"""run.py CONFIG VARIANT [key=value ...]   VARIANT: text | mend ; key=value overrides protocol flags,
plus max=, sec=, want=, fb="""

import sys
from tasks import *


def W(i, life=1, slots=1, claims=1, hbs=1, reaps=0, snz=0, st=None):
    sl = st if st is not None else (("i",),) * slots
    return ("W", life, (1, i, 0) if life else 0, (), sl, ("i",) if life else ("sc", 0), ("i",), claims, hbs, reaps, 0, snz)


def mk(procs, names, ntask=1, recs=None, ents=(), fb=0, acked=0, sess=None, **cfg):
    n = len(procs)
    if sess is None:
        sess = tuple(((1, i, 0), (), (), 0, ()) if p[0] == "W" and p[1] == 1 else None for i, p in enumerate(procs))
    st = (recs or (None,) * ntask, frozenset(ents), sess, frozenset(), tuple(procs), ((acked, 0, 0),) * ntask, fb)
    c = dict(names=names, outcomes={})
    c.update(cfg)
    return c, st


def P0(t=0, att=0):
    return ("P", 1, (1, 0), 0, 0, att, 0, ())


def F0(rev=2, att=2):
    return ("F", rev, (1, 0), 0, 0, att, 0, ())


SUB = lambda t=0: ("S", ("s",), t)
CAN = lambda t=0: ("C", ("g",), t)
RED = lambda n=1, t=0: ("D", ("g",), t, n)


def configs(name, fb):
    if name == "A":  # submit, two workers, retry, heartbeat; no reaper
        return mk([W(0, claims=2, hbs=1), W(1, claims=2, hbs=1), SUB()], ["W1", "W2", "Sub"], fb=fb, outcomes={0: "Cr", 1: "C"})
    if name == "A0":  # the smallest: submit, W1 claims and retries, W2
        return mk([W(0, claims=1, hbs=0), W(1, claims=1, hbs=0), SUB()], ["W1", "W2", "Sub"], fb=fb, outcomes={0: "Cr", 1: "C"})
    if name == "B":  # keyed submit twice, the hour
        return mk([W(0, claims=2, hbs=1), SUB(), SUB()], ["W1", "SubA", "SubB"], fb=fb, hour=1, outcomes={0: "C"})
    if name == "B2":  # the same, two workers
        return mk(
            [W(0, claims=1, hbs=1), W(1, claims=1, hbs=0), SUB(), SUB()],
            ["W1", "W2", "SubA", "SubB"],
            fb=fb,
            hour=1,
            outcomes={0: "C", 1: "C"},
        )
    if name == "B1":  # plain submit, the hour
        return mk(
            [W(0, claims=1, hbs=1), W(1, claims=1, hbs=1), SUB()], ["W1", "W2", "Sub"], fb=fb, hour=1, outcomes={0: "Cr", 1: "C"}
        )
    if name == "C":  # takeover and reap of a live worker
        return mk(
            [W(0, claims=1, hbs=2), W(1, claims=2, hbs=1, reaps=1)],
            ["W1", "W2"],
            recs=(P0(),),
            ents=[(0, 1, 0)],
            acked=1,
            fb=fb,
            outcomes={0: "Cr", 1: "C"},
        )
    if name == "C2":  # both reap each other
        return mk(
            [W(0, claims=2, hbs=2, reaps=1), W(1, claims=2, hbs=2, reaps=1)],
            ["W1", "W2"],
            recs=(P0(),),
            ents=[(0, 1, 0)],
            acked=1,
            fb=fb,
            outcomes={0: "Cr", 1: "Cr"},
        )
    if name == "C3":  # two reapers of one worker
        return mk(
            [W(0, claims=1, hbs=1), W(1, claims=1, hbs=1, reaps=1), W(2, claims=1, hbs=1, reaps=1)],
            ["W1", "W2", "W3"],
            recs=(P0(),),
            ents=[(0, 1, 0)],
            acked=1,
            fb=fb,
            outcomes={0: "Cr", 1: "C", 2: "C"},
        )
    if name == "D":  # same worker claims again while a heartbeat answer is slow
        return mk(
            [W(0, claims=2, hbs=2), W(1, claims=1, hbs=0, reaps=1)],
            ["W1", "W2"],
            recs=(P0(),),
            ents=[(0, 1, 0)],
            acked=1,
            fb=fb,
            outcomes={0: "r", 1: "C"},
        )
    if name == "D2":  # two slots of one worker
        return mk(
            [W(0, claims=2, hbs=2, slots=2), W(1, claims=1, hbs=0, reaps=1)],
            ["W1", "W2"],
            recs=(P0(),),
            ents=[(0, 1, 0)],
            acked=1,
            fb=fb,
            outcomes={0: "rC", 1: "C"},
        )
    if name == "E":  # redrive twice, cancel, worker
        return mk(
            [W(0, claims=1, hbs=1), RED(1), RED(1), CAN()],
            ["W1", "Red1", "Red2", "Can"],
            recs=(F0(),),
            ents=[],
            acked=1,
            fb=fb,
            outcomes={0: "CF"},
        )
    if name == "E2":  # redrive, two workers
        return mk(
            [W(0, claims=1, hbs=1), W(1, claims=1, hbs=0, reaps=1), RED(1)],
            ["W1", "W2", "Red"],
            recs=(F0(),),
            ents=[(0, 1, 0)],
            acked=1,
            fb=fb,
            outcomes={0: "CF", 1: "C"},
        )
    if name == "F":  # cancel a running task, its worker dies, reap
        return mk(
            [W(0, claims=1, hbs=2), W(1, claims=1, hbs=0, reaps=1), CAN()],
            ["W1", "W2", "Can"],
            recs=(P0(),),
            ents=[(0, 1, 0)],
            acked=1,
            fb=fb,
            outcomes={0: "rC", 1: "C"},
        )
    if name == "F2":  # cancel, redrive, cancel by mailbox
        return mk(
            [W(0, claims=2, hbs=2), RED(1), CAN()],
            ["W1", "Red", "Can"],
            recs=(P0(),),
            ents=[(0, 1, 0)],
            acked=1,
            fb=fb,
            outcomes={0: "F"},
        )
    if name == "G":  # session create ambiguous, reap, second life of the same session id
        return mk(
            [W(0, life=0, claims=1, hbs=1), W(1, claims=1, hbs=0, reaps=2)],
            ["W1", "W2"],
            recs=(P0(),),
            ents=[(0, 1, 0)],
            acked=1,
            fb=fb,
            outcomes={0: "C", 1: "C"},
        )
    if name == "H":  # two tasks, two slots, reaper dies halfway, second reaper
        return mk(
            [W(0, claims=2, hbs=2, slots=2), W(1, claims=1, hbs=0, reaps=1), W(2, claims=0, hbs=0, reaps=1)],
            ["W1", "W2", "W3"],
            ntask=2,
            recs=(P0(), P0()),
            ents=[(0, 1, 0), (1, 1, 0)],
            acked=1,
            fb=fb,
            outcomes={0: "C", 1: "C", 2: "C"},
        )
    if name == "I":  # release at shutdown against the reaper
        return mk(
            [W(0, claims=1, hbs=2), W(1, claims=1, hbs=1, reaps=1)],
            ["W1", "W2"],
            recs=(P0(),),
            ents=[(0, 1, 0)],
            acked=1,
            fb=fb,
            shutdown=1,
            outcomes={0: "lz", 1: "C"},
        )
    if name == "J":  # release, reap, cancel all at once
        return mk(
            [W(0, claims=1, hbs=1), W(1, claims=1, hbs=1, reaps=1), CAN()],
            ["W1", "W2", "Can"],
            recs=(P0(),),
            ents=[(0, 1, 0)],
            acked=1,
            fb=fb,
            shutdown=1,
            outcomes={0: "l", 1: "C"},
        )
    if name == "K":  # poison: handler always dies or retries, two workers
        return mk(
            [W(0, claims=2, hbs=1, reaps=1), W(1, claims=2, hbs=1, reaps=1)],
            ["W1", "W2"],
            recs=(P0(),),
            ents=[(0, 1, 0)],
            acked=1,
            fb=fb,
            outcomes={0: "r", 1: "r"},
        )
    if name == "L":  # the ops window: checkpoints push our op out
        return mk(
            [W(0, claims=2, hbs=1, slots=2, snz=1), W(1, claims=1, hbs=0, reaps=1)],
            ["W1", "W2"],
            recs=(P0(),),
            ents=[(0, 1, 0)],
            acked=1,
            fb=fb,
            outcomes={0: "rkC", 1: "C"},
        )
    if name == "M":  # everything, small: submit, cancel, redrive, two workers
        return mk(
            [W(0, claims=1, hbs=1), W(1, claims=1, hbs=0, reaps=1), SUB(), CAN(), RED(1)],
            ["W1", "W2", "Sub", "Can", "Red"],
            fb=fb,
            outcomes={0: "CFr", 1: "C"},
        )
    if name == "N":  # the worker that lives on: unknown claim (selfrun)
        return mk([W(0, claims=2, hbs=1), SUB()], ["W1", "Sub"], fb=fb, outcomes={0: "C"})
    if name == "O":  # a worker creates a follow-up already claimed by itself (§7), reaper suspects it
        st = (("pe", (0, 1, 1), ("cas", 0, 0, ("R", 1, (1, 1), 1, 1, 1, 0, ()), "claim", 0)),)
        return mk(
            [W(0, claims=1, hbs=2, st=st), W(1, claims=2, hbs=1, reaps=1)],
            ["W1", "W2"],
            fb=fb,
            hour=1,
            outcomes={0: "Cr", 1: "C"},
        )
    raise SystemExit("no such config " + name)


def main():
    name, var = sys.argv[1:3]
    P = dict(MEND if var == "mend" else TEXT)
    o = dict(max="3000000", sec="300", want="1", fb="0", order="bfs", ignore="", sole="0")
    for a in sys.argv[3:]:
        k, v = a.split("=")
        if k in o:
            o[k] = v
        else:
            assert k in P, k
            P[k] = int(v) if v.isdigit() else v
    cfg, init = configs(name, int(o["fb"]))
    m = Model(P, cfg)
    ig = [x for x in o["ignore"].split(",") if x]
    if o["order"] == "walk":
        r = walks(m, init, float(o["sec"]), ignore=ig, solek=int(o["sole"]))
    else:
        r = explore(m, init, int(o["max"]), float(o["sec"]), int(o["want"]), order=o["order"], ignore=ig, solek=int(o["sole"]))
    print(
        "%s %s fb=%s %s: states=%d transitions=%d %.0fs %s; recovery run from %d distinct stores, sole-survivor run from %d; violating states %d"
        % (
            name,
            var,
            o["fb"],
            " ".join(sys.argv[3:]),
            r["states"],
            r["trans"],
            r["sec"],
            "EXHAUSTIVE" if r["full"] else "partial",
            r["recov"],
            r["sole"],
            r["nviol"],
        )
    )
    for v, tr, st in r["found"]:
        print("  ** " + v)
        for n, (who, lab) in enumerate(tr):
            print("   %2d. %-10s %s" % (n + 1, who, show(lab, cfg["names"])))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
