"""Workers in processes that tests kill."""

import asyncio
import signal


async def kill_at_random(start, workers, rng, *, seconds, longest):
    """Kill two of four workers at random moments again and again; each is replaced, as a supervisor would."""
    kills = 0
    ends = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < ends:
        await asyncio.sleep(rng.uniform(0.5, longest))
        victim = rng.randrange(2)
        assert workers[victim].returncode is None, "a worker ended by itself"
        workers[victim].send_signal(signal.SIGKILL)
        await workers[victim].wait()
        kills += 1
        workers[victim] = await start()
    return kills
