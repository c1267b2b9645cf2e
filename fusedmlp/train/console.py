"""The output of a run: nothing (Quiet), or lines and, on a terminal, a bar (Console)."""

import logging
import sys
import time

from .config import RunOptions, TrainConfig
from .errors import printable

# Figures of a run's summary, in the order of the table at its end.
FIGURES = (
    *("test_accuracy", "test_r2", "test_rmse", "test_loss"),
    *("val_accuracy", "val_loss", "train_accuracy", "train_loss"),
)


class Output:
    """Standard output whose failures do not end a run: characters that it lacks become escapes, and
    once it is closed or full, or its reader is gone, no more is written."""

    def __init__(self):
        # While a bar of rich is shown, sys.stdout is a proxy of it.
        self.stream = getattr(sys.stdout, "rich_proxied_file", sys.stdout)

    @property
    def encoding(self) -> str:
        return getattr(self.stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._try(lambda stream: stream.isatty()) or False

    def write(self, text: str) -> int:
        printable = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._try(lambda stream: stream.write(printable))
        return len(text)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def _try(self, do):
        try:
            return None if self.stream is None else do(self.stream)
        except (OSError, ValueError):  # ValueError: it has been closed
            self.stream = None


class Quiet:
    """The interface, and the output of a run that says nothing."""

    def start(self, *parts) -> None: ...
    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None:
        logging.getLogger("fusedmlp").warning(text)

    def steps(self, position, steps: int | None) -> None: ...
    def epoch(self, row: dict) -> None: ...
    def trained(self, done: int, total: int) -> None: ...
    def finish(self, result) -> None: ...
    def close(self) -> None: ...


class Console(Quiet):
    """One line an epoch; on a terminal also a bar of the present epoch, and a table at the end."""

    def __init__(self):
        self.output = Output()
        try:
            from rich.console import Console as Rich
        except ImportError:
            self.rich = None
        else:
            self.rich = Rich(highlight=False, soft_wrap=True, file=self.output)
        self.bar = self.job = None
        self.epochs = 0
        self.rows = 0
        self.redrawn = 0.0

    @property
    def is_terminal(self) -> bool:
        return self.rich is not None and self.rich.is_terminal

    def say(self, text: str) -> None:
        text = printable(text)
        if self.rich is not None:
            self.rich.print(text, markup=False)
        else:
            print(text, file=self.output, flush=True)

    def note(self, text: str) -> None:
        self.say(f"note: {text}")

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def start(self, run) -> None:
        config, task = run.config, run.task
        self.epochs = config.epochs
        self.rows = 0 if task.x is None else len(task.x)
        dims = "-".join(str(d) for d in run.about["model"]["dims"])
        rows = f"{self.rows} rows" if self.rows else "batches from a loader"
        several = (config.networks or 1) > 1
        networks = f"{config.networks} networks of " if several else ""
        self.say(
            f"{run.data.name}: {rows}; {networks}{dims}, "
            f"{sum(p.numel() for p in task.model.parameters())} parameters{' each' * several}"
        )
        self.say(
            f"{config.epochs} epochs"
            + (f" of batches of {config.batch_size}" if self.rows else "")
            + f" on {task.device}, {config.precision}, "
            f"engine {run.engine.name}, seed {config.seed}"
            + (f", {run.world.size} processes" if run.world.size > 1 else "")
        )
        self.say("settings: " + _shown_settings(config, run.options or RunOptions()))
        if run.folder is not None:
            self.say(f"run folder: {run.folder.path}")
        if run.position.global_step:
            self.say(f"going on from epoch {run.position.epoch + 1}, step {run.position.step}")
        if self.is_terminal:
            self._start_bar(run.position)

    def _start_bar(self, position) -> None:
        from rich import progress

        self.bar = progress.Progress(
            progress.TextColumn("epoch {task.fields[epoch]}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[state]}"),
            progress.TimeRemainingColumn(),
            console=self.rich,
            transient=True,
        )
        self.job = self.bar.add_task(
            "", total=None, epoch=f"{position.epoch + 1}/{self.epochs}", state=""
        )
        self.bar.start()

    def steps(self, position, steps) -> None:
        if self.bar is None or time.monotonic() - self.redrawn < 0.1:
            return
        self.redrawn = time.monotonic()
        accuracy = f"accuracy {position.right / position.rows:.4f}  " if position.right else ""
        speed = position.rows / max(position.seconds, 1e-9)
        self.bar.update(
            self.job,
            completed=position.step,
            total=steps,
            epoch=f"{position.epoch + 1}/{self.epochs}",
            state=f"loss {position.loss / position.rows:.4f}  {accuracy}{speed:,.0f} rows/s",
        )

    def trained(self, done: int, total: int) -> None:
        if self.bar is not None:
            self.bar.update(self.job, completed=done, total=total, epoch=f"{done}/{total}")

    def epoch(self, row: dict) -> None:
        parts = [f"epoch {row['epoch']:>3}/{self.epochs}"]
        for part in ("train", "val", "test"):
            if row[f"{part}_loss"] is None:
                continue
            parts.append(f"{part} loss {row[f'{part}_loss']:.4f}")
            if row[f"{part}_accuracy"] is not None:
                parts[-1] += f" accuracy {row[f'{part}_accuracy']:.4f}"
        speed = (
            f"  {self.rows / row['seconds']:,.0f} rows/s" if self.rows and row["seconds"] else ""
        )
        self.say("  ".join(parts) + f"  {row['seconds']:.2f} s{speed}")

    def finish(self, result) -> None:
        self.close()
        if result.interrupted:
            where = (
                f"; go on with: fusedmlp train --resume {result.folder}" if result.folder else ""
            )
            self.say(
                f"interrupted after {len(result.history)} of {result.config.epochs} epochs{where}"
            )
            return
        summary = result.summary
        rows = [
            (name.replace("_", " "), figure(summary[name]))
            for name in FIGURES
            if summary.get(name) is not None
        ]
        if result.config.keep == "best":
            rows.append(("kept epoch", kept_words(result)))
        speed, engine = summary["samples_per_second"], f"{summary['engine']} engine"
        rows += [
            ("training time", f"{summary['train_seconds']:.2f} s"),
            ("speed", f"{speed:,.0f} rows/s" if speed else "-"),
            ("runs on", f"{summary['device']}, {summary['backend']} kernels, {engine}"),
            *(("written", str(path)) for path in result.paths.values()),
        ]
        self._table(rows)

    def _table(self, rows: list[tuple[str, str]]) -> None:
        if self.is_terminal:
            from rich.table import Table

            table = Table(show_header=False)
            for row in rows:
                table.add_row(*row)
            self.rich.print(table)
            return
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self.say(f"{name:<{width}}  {value}")

    def show(self, table) -> None:
        """A table of rich. A pipe has no width: lines must not be folded there."""
        from rich.console import Console as Rich

        wide = Rich(width=1000, highlight=False, file=self.output)
        (self.rich if self.is_terminal else wide).print(table)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def kept_words(result) -> str:
    """Which epoch a run has kept, and why it is over."""
    config, done, kept = result.config, len(result.history), result.summary["kept_epoch"]
    each = "each " if isinstance(kept, list) else ""
    kept = ", ".join(map(str, kept)) if each else kept
    text = f"{kept} of {done}, {each}the best on the rows held out"
    if done < config.epochs:
        text += f"; stopped after {config.patience} epochs without a better one"
    return text


def _shown_settings(config: TrainConfig, options: RunOptions) -> str:
    return "  ".join(
        f"{name}={_plain(value)}"
        for name, value in (config.to_dict() | options.to_dict()).items()
        if value is not None
    )


def figure(value) -> str:
    """Shares and losses with four decimals, large values, which have units, with six digits."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.6g}"


def _plain(value) -> str:
    return ",".join(str(v) for v in value) if isinstance(value, list) else str(value)
