"""Parts of a long command: each in a process of its own, with a time limit, a log and an outcome,
so that one that crashes or hangs costs itself alone. This file imports nothing of fastadv, which a
part may be about to install."""

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field

GRACE = 5  # seconds between asking a part to end, so that it says where it was, and ending it
LEAST = 5  # seconds; with less of the budget left no part begins
TAIL = 12  # lines of a failed part's log on the screen


@dataclass(frozen=True)
class Part:
    """A command and the seconds that it may take; missing: why it cannot run here."""

    name: str
    command: tuple
    limit: float
    environment: dict = field(default_factory=dict)
    missing: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a part ended: "passed", "failed", "timed out", "not run" for want of time, or "skipped",
    as it cannot run here; and why."""

    name: str
    state: str
    seconds: float = 0.0
    why: str = ""


def run_parts(parts, out, budget, cwd, outcomes=()):
    """Runs the parts in their order and returns their outcomes after those before. What a part
    prints goes to `out`/<name>.log; `out`/summary.txt has the outcomes so far. budget: seconds for
    all."""
    end, outcomes = time.monotonic() + budget, [*outcomes]
    for part in parts:
        left = end - time.monotonic()
        if part.missing:
            outcome = Outcome(part.name, "skipped", why=part.missing)
        elif left < LEAST:
            outcome = Outcome(part.name, "not run", why="the budget is spent")
        else:
            outcome = run_part(part, out / f"{part.name}.log", min(part.limit, left), cwd)
        outcomes.append(outcome)
        print(f"{outcome.name:12} {outcome.state:9} {outcome.seconds:4.0f} s", flush=True)
        (out / "summary.txt").write_text("\n".join(screen(outcomes, out)) + "\n")
    return outcomes


def run_part(part, log, limit, cwd):
    """Runs one part for at most `limit` seconds. With it end the processes that it began."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background, and inherited
        signal.signal(signal.SIGINT, signal.default_int_handler)
    start = time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen(
            part.command,
            cwd=cwd,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | part.environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            why = f"exit status {code}" if code else ""
        except subprocess.TimeoutExpired:
            code, why = None, f"stopped after {limit:.0f} s"
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:  # also when this process is interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in a driver
                process.wait(GRACE)
    state = {0: "passed", None: "timed out"}.get(code, "failed")
    return Outcome(part.name, state, time.monotonic() - start, why)


def screen(outcomes, out):
    """One line per part; below those that failed or timed out, the end of their logs."""
    lines = []
    for outcome in outcomes:
        why = f"  {outcome.why}" if outcome.why else ""
        lines.append(f"{outcome.state:9} {outcome.name:12} {outcome.seconds:5.0f} s{why}")
        if outcome.state in ("failed", "timed out"):
            log = (out / f"{outcome.name}.log").read_text(errors="replace").rstrip().splitlines()
            lines += [f"    {line}" for line in log[-TAIL:]]
    return lines
