"""Runs that are stopped: by Ctrl-C, SIGTERM and SIGKILL at any moment, in the middle of a write, by
another run in their folder, or by the end of another process of theirs. Each must go on, or be
refused, and end with the bits of a run that nobody stopped."""

import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from . import child, inject, runs

FLAGS = f"{runs.TRAIN} --epochs 40"
LATEST = 60.0  # seconds from a signal to the end of a run, on a machine as busy as it may be


def _whole(place: Path, flags: str, draws: bool = False) -> tuple[dict, float]:
    """What a run that nobody stops leaves, and its seconds."""
    runs.make_data(place)
    started = time.monotonic()
    ended = child.run(
        lambda: runs.command(place, f"{flags} --out whole", draws), place, child.HANGS
    )
    seconds = time.monotonic() - started
    if ended.result != 0:
        raise RuntimeError(f"faults: a run without a fault has failed: {ended}")
    return runs.content(place / "whole"), seconds


def _start(place: Path, flags: str, run: Path, name="said.txt", draws=False, **environment: str):
    """Start the run, or have it go on where it has a checkpoint."""
    go_on = (run / "checkpoint.pt").exists()
    words = f"train --resume {run.name} --device cpu" if go_on else f"{flags} --out {run.name}"
    if not go_on:
        words += " --overwrite"

    def work():
        os.environ.update(environment)
        return runs.command(place, words, draws)

    return (*child.start(work, place / name), place / name)


def _finish(place: Path, flags: str, run: Path, wanted: dict, draws: bool = False) -> str | None:
    """Let the run go on to its end; what is wrong then."""
    ended = child.end(*_start(place, flags, run, draws=draws), child.HANGS)
    is_done = ended.result == 2 and "has done its" in ended.said
    if ended.result != 0 and not is_done:
        return f"it did not go on: {ended.crash() or ended.error or ended.said[-400:]}"
    if left := runs.unfinished(run):
        return f"left behind: {', '.join(left)}"
    return runs.differs(run, wanted)


def killed(place: Path, dice: random.Random, count: int) -> Iterator[str | None]:
    """SIGKILL at any moment of a run and of what goes on from it, again and again until one gets
    through."""
    wanted, seconds = _whole(place, FLAGS)
    run, since = place / "run", 0
    for _ in range(count):
        started = _start(place, FLAGS, run)
        time.sleep(dice.uniform(0, 1.05 * seconds))
        os.kill(started[0], signal.SIGKILL)
        ended = child.end(*started, child.HANGS)
        since += 1
        if ended.signal == signal.SIGKILL:
            yield None
        else:  # it was at its end already
            yield _finish(place, FLAGS, run, wanted)
            shutil.rmtree(run)
    yield _finish(place, FLAGS, run, wanted)


def killed_while_writing(place: Path, dice: random.Random, count: int) -> Iterator[str | None]:
    """SIGKILL in the middle of a write, before and after a rename, or when a file is made: at each
    in turn, so often as there are any, or at `count` of them."""
    flags = f"{runs.TRAIN} --epochs 3"
    wanted, _ = _whole(place, flags, draws=True)
    run = place / "run"

    def work(n: int):
        with inject.disk(n, inject.KILLS, run) as counted:
            runs.command(place, f"{flags} --out run --overwrite")
        return counted.number

    all_of_them = child.run(lambda: work(inject.NEVER), place, child.HANGS).result
    shutil.rmtree(run)
    numbers = range(1, all_of_them + 1)
    for n in sorted(dice.sample(numbers, min(count, len(numbers)))):
        ended = child.run(lambda n=n: work(n), place, child.HANGS)
        if ended.signal != signal.SIGKILL:
            yield f"write {n} of {all_of_them} did not end it"
            continue
        yield _finish(place, flags, run, wanted, draws=True)
        shutil.rmtree(run)


def _is_in_its_command(process: int) -> bool:
    """Whether it catches SIGTERM, as the command does from its start to its end, or has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    about = dict(line.split(":", 1) for line in lines)
    caught = int(about.get("SigCgt", "0"), 16)
    return "Z" in about["State"] or bool(caught >> (signal.SIGTERM - 1) & 1)


def interrupted(place: Path, dice: random.Random, count: int) -> Iterator[str | None]:
    """Ctrl-C or SIGTERM at any moment: the run ends by itself, and goes on."""
    wanted, seconds = _whole(place, FLAGS)
    for number in range(count):
        run = place / f"run{number}"
        sent = dice.choice((signal.SIGINT, signal.SIGTERM))
        started = _start(place, FLAGS, run)
        while not _is_in_its_command(started[0]):
            time.sleep(0.001)
        time.sleep(dice.uniform(0, seconds))
        os.kill(started[0], sent)
        at = time.monotonic()
        ended = child.end(*started, child.HANGS)
        took = time.monotonic() - at
        if ended.signal == sent and (run / "summary.json").exists():  # after its command's end
            yield runs.differs(run, wanted)
        elif ended.crash() or ended.error:
            yield f"{sent.name}: {ended.crash() or ended.error}"
        elif took > LATEST:
            yield f"{sent.name}: it took {took:.0f} s to end"
        elif ended.result not in (0, 130, 143) or "Traceback" in ended.said:
            yield f"{sent.name}: exit code {ended.result}: {ended.said[-400:]}"
        elif ended.result and not any(
            text in ended.said for text in ("interrupted", "go on with", "stopped")
        ):
            yield f"{sent.name}: it said nothing of its end: {ended.said[-400:]}"
        else:
            yield _finish(place, FLAGS, run, wanted)
        shutil.rmtree(run, ignore_errors=True)


PAIRS = (
    ("new folder", f"{FLAGS} --out run", f"{FLAGS} --out run"),
    ("both --overwrite", f"{FLAGS} --out run --overwrite", f"{FLAGS} --out run --overwrite"),
    ("both --resume", "train --resume run --epochs 60", "train --resume run --epochs 60"),
    (
        "--resume and --overwrite",
        "train --resume run --epochs 60",
        f"{FLAGS} --out run --overwrite",
    ),
)


def two_at_once(place: Path, dice: random.Random, count: int) -> Iterator[str | None]:
    """Two runs into one folder: one of them ends as if it were alone, and the other is refused, or
    comes after it."""
    flags = f"{runs.TRAIN} --epochs 60"
    wanted = {40: _whole(place, FLAGS)[0]}
    shutil.move(place / "whole", place / "first")
    wanted[60] = _whole(place, flags)[0]
    run = place / "run"
    for number in range(count):
        name, *both = PAIRS[number % len(PAIRS)]
        shutil.rmtree(run, ignore_errors=True)
        if "resume" in name or "overwrite" in name:
            shutil.copytree(place / "first", run)
        started = []
        for i, words in enumerate(both):
            said = place / f"said{i}.txt"
            started.append(
                (*child.start(lambda w=words: runs.command(place, w, False), said), said)
            )
            time.sleep(dice.choice((0, 0, 0.05, 0.3)))
        ended = [child.end(*one, child.HANGS) for one in started]
        codes = [e.crash() or e.error or e.result for e in ended]
        right = [words for words, code in zip(both, codes, strict=True) if code == 0]
        wrong = [runs.complaint(e.said, e.result, (1, 2)) for e in ended if e.result != 0]
        if not right or any(wrong):
            yield f"{name}: {codes}: {[e.said[-200:] for e in ended]}"
            continue
        epochs = {60 if "60" in words else 40 for words in right}
        found = [runs.differs(run, wanted[each]) for each in epochs]
        left = runs.unfinished(run)
        yield None if None in found and not left else f"{name}: {codes}: {found}, left {left}"


def rank_dies(place: Path, dice: random.Random, count: int) -> Iterator[str | None]:
    """One of two processes that train together is killed: the other ends with a message, and the
    run goes on."""
    runs.make_data(place)
    began = time.monotonic()
    alone = [child.end(*one, child.HANGS) for one in _pair(place, place / "whole")]
    seconds = time.monotonic() - began
    if [e.result for e in alone] != [0, 0]:
        raise RuntimeError(f"faults: two processes without a fault have failed: {alone}")
    wanted = runs.content(place / "whole")
    for number in range(count):
        run, dies = place / f"run{number}", dice.randrange(2)
        both = _pair(place, run)
        time.sleep(dice.uniform(0, seconds))
        os.kill(both[dies][0], signal.SIGKILL)
        at = time.monotonic()
        ended = child.end(*both[1 - dies], child.HANGS)
        took = time.monotonic() - at
        child.end(*both[dies], child.HANGS)
        wrong = ended.crash() or ended.error
        if not wrong and ended.result != 0:
            wrong = runs.complaint(ended.said, ended.result)
            if "another process has ended" not in ended.said and "could not join" not in ended.said:
                wrong = wrong or f"it said {ended.said[-400:]}"
        if took > LATEST and "could not join" not in ended.said:
            wrong = wrong or f"it took {took:.0f} s to end"
        if not wrong and ended.result != 0:
            again = [child.end(*one, child.HANGS) for one in _pair(place, run)]
            codes = [e.crash() or e.error or e.result for e in again]
            is_done = codes == [2, 2] and "has done its" in again[0].said
            if codes != [0, 0] and not is_done:
                wrong = f"then {codes}: {again[0].said[-300:]}"
            wrong = wrong or runs.differs(run, wanted)
        yield wrong and f"rank {dies} died: {wrong}"
        shutil.rmtree(run, ignore_errors=True)


def _pair(place: Path, run: Path) -> list:
    """The two processes of a run, as torchrun starts them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # torch takes up to twice as long to give up where the first process never began to listen.
    common |= {"GLOO_SOCKET_IFNAME": "lo", "FUSEDMLP_DDP_SECONDS": "120"}
    flags = f"{runs.TRAIN} --epochs 20"
    started = []
    for rank in ("0", "1"):
        own = {"RANK": rank, "LOCAL_RANK": rank, **common}
        started.append(_start(place, flags, run, f"said{rank}.txt", **own))
    return started
