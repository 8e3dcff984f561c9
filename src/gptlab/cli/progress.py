"""What a training run shows while it goes on: a live panel on a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gptlab.training.curves import Smoothed

EVERY = 10.0  # seconds between two lines where there is no terminal
SPAN = 100.0  # steps that the smoothed loss reaches back


class Progress:
    """Shows a run from the rows that it reports, as in ``metrics.jsonl``, and its notes; what a row lacks is not shown.

    The plan comes first, then, as soon as it is measured, the rate and when the run will be done. A terminal gets a
    live panel and one lasting line per evaluation and checkpoint; anything else one line per evaluation and at most
    one every ten seconds between, without escape codes. Use it as a context manager: it takes the panel away again,
    whatever happens.

    Args:
        console: where to show; else standard output, live where that is a terminal, whatever FORCE_COLOR says.
        clock: seconds since 1970.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.time) -> None:
        self.console = console or Console(force_terminal=sys.stdout.isatty())
        self.clock = clock
        self.live: Live | None = None
        self.printed = -math.inf  # when the last plain line was
        self._begin({})

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, row: dict[str, Any]) -> None:
        """Take the next row of the run."""
        match row["event"]:
            case "start":
                self.close()
                self._begin(row)
                self._print(plan(row))
                self._open()
            case "step":
                self._step(row)
            case "evaluate":
                self._print(_joined(_position(row), _figure("validation loss {:.4f}", row, "validation_loss")))
            case "checkpoint" if self.live is not None:
                self._print(_joined(_position(row), _figure("saved {}", row, "path")))
            case "note":
                self._print(_figure("{}", row, "text"))
            case "end":
                self.close()
                loss = _figure("validation loss {:.4f}", row, "validation_loss")
                self._print(_joined(_figure("{}", row, "reason"), _position(row), loss, self._elapsed()))

    def close(self) -> None:
        """Take the panel away and leave the terminal as it was."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _begin(self, start: dict[str, Any]) -> None:
        self.start = start
        self.row: dict[str, Any] = {}  # the last measured step
        self.first: dict[str, Any] = {}  # the first measured step since the start
        self.smoothed, self.average = Smoothed(SPAN), math.nan
        self.began, self.done_at = self.clock(), math.nan

    def _open(self) -> None:
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            # Twice a second is enough for the clocks to tick, and leaves the processor to the training.
            self.live = Live(console=self.console, get_renderable=self.panel, refresh_per_second=2, transient=True)
            self.live.start(refresh=True)

    def _step(self, row: dict[str, Any]) -> None:
        now = self.clock()
        announced = not math.isnan(self.done_at)
        self.row, self.first = row, self.first or row
        if row.get("loss") is not None:
            self.average = self.smoothed.update(row.get("step", 0), row["loss"])
        # The very first step is slow and tells little, unless it takes so long that it is better than nothing.
        warm = row.get("step", 0) - self.start.get("step", 0) > 1 or now - self.began >= EVERY
        left = self._seconds_left() if warm else math.nan
        self.done_at = now + left
        if not announced and not math.isnan(left):
            rate = _figure("{:,.0f} tokens/s", row, "tokens_per_second")
            self._print(_joined(rate, f"{duration(left)} left", self._finish()))
            self.printed = now
        elif self.live is None and now - self.printed >= EVERY:
            self._print(_joined(_position(row, self.start), self._losses(), self._speed(), self._finish()))
            self.printed = now

    def _print(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)

    def _seconds_left(self) -> float:
        """Return the seconds to the end at the mean rate since the first measured step, evaluations included, or nan.

        The first step alone tells by its own rate.
        """
        row, first = self.row, self.first
        steps = self.start.get("steps", math.nan) - row.get("step", math.nan)
        taken = row.get("step", math.nan) - first.get("step", math.nan)
        seconds = row.get("seconds", math.nan) - first.get("seconds", math.nan)
        if taken > 0 and seconds > 0:
            return steps * seconds / taken
        if rate := row.get("tokens_per_second"):
            return steps * self.start.get("tokens_per_step", math.nan) / rate
        return math.nan

    def panel(self) -> Panel:
        """Return the live panel as it stands now."""
        position = {"step": self.start.get("step", 0), **self.row}
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        head.add_row(ProgressBar(self.start.get("steps"), position["step"]), _position(position, self.start))
        rate = _figure("learning rate {:.2e}", self.row, "learning_rate")
        norm = _figure("gradient norm {:.2f}", self.row, "gradient_norm")
        left = "" if math.isnan(self.done_at) else f"{duration(self.done_at - self.clock())} left"
        lines = (
            _joined(self._losses(), rate, norm),
            self._speed() or "measuring the rate",
            _joined(self._elapsed(), left, self._finish()),
        )
        body = Group(head, *(Text(line) for line in lines if line))
        return Panel(body, title=Text(str(self.start.get("name", "training"))), title_align="left")

    def _losses(self) -> str:
        average = "" if math.isnan(self.average) else f"smoothed {self.average:.4f}"
        own = _figure("cross-entropy {:.4f}", self.row, "cross_entropy")
        return _joined(_figure("loss {:.4f}", self.row, "loss"), average, own)

    def _speed(self) -> str:
        rate, memory = self.row.get("tokens_per_second"), self.row.get("memory_bytes")
        work, peak = self.start.get("flops_per_token"), self.start.get("peak_flops")
        use = f"MFU {rate * work / peak:.1%}" if rate and work and peak else ""
        kept = f"memory {memory / 2**30:.2f} GiB" if memory else ""
        return _joined(_figure("{:,.0f} tokens/s", self.row, "tokens_per_second"), use, kept)

    def _elapsed(self) -> str:
        return f"{duration(self.clock() - self.began)} elapsed"

    def _finish(self) -> str:
        if math.isnan(self.done_at):
            return ""
        end, now = time.localtime(self.done_at), time.localtime(self.clock())
        return f"done at {time.strftime('%H:%M' if end[:3] == now[:3] else '%a %d %b %H:%M', end)}"


def plan(start: dict[str, Any]) -> str:
    """Return a run's plan in one line, from its ``start`` row: steps, tokens, size, machine, and what MFU refers to."""
    steps, tokens, peak = start.get("steps"), start.get("tokens_per_step"), start.get("peak_flops")
    source = _figure(" ({})", start, "peak_source")
    parts = (
        _figure("{:,} steps", start, "steps"),
        f"{steps * tokens:,} tokens ({tokens:,} a step)" if steps and tokens else "",
        f"{100 * start['share']:.4g}% of {start['share_of']:,} tokens" if start.get("share") else "",
        _figure("{:,} parameters", start, "parameters"),
        _figure("learning from {}", start, "teacher"),
        _joined(_figure("{}", start, "device"), _figure("{}", start, "dtype"), by=" "),
        _figure("resumed after step {:,}", start, "resumed_from"),
        f"MFU relative to {peak / 1e12:.3g} TFLOP/s{source}" if peak else "",
    )
    return _joined(_figure("{}:", start, "name"), _joined(*parts, by=", "), by=" ")


def _position(row: dict[str, Any], start: dict[str, Any] | None = None) -> str:
    return _joined(_figure("step {:,}", row, "step"), _figure("of {:,}", start or {}, "steps"), by=" ")


def _figure(template: str, row: dict[str, Any], key: str) -> str:
    """Return a figure of a row as the template has it, or nothing where the row lacks it."""
    return "" if row.get(key) is None else template.format(row[key])


def _joined(*parts: str, by: str = "  ") -> str:
    return by.join(part for part in parts if part)


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds as 1:02:03, with the days before them where there are any."""
    minutes, second = divmod(max(round(seconds), 0), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02}:{second:02}"
