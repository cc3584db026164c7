"""What a run shows: its lines and one progress bar on the terminal; the lines of libraries go to a log file."""

from __future__ import annotations

import io
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

_PACKAGE = str(Path(__file__).parents[1])
# NeMo's logger hands nothing on to the root logger. Both are quiet on ranks other than 0, as in NeMo.
_LOGGERS = ("nemo_llm_feedback", "nemo_logger")
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK")

T = TypeVar("T")


class _Terminal(io.TextIOBase):
    """A standard stream as it was, whose end is not the job's: a terminal that is closed, or a reader that has left,
    gets no further line. A sign that the stream's encoding lacks becomes a question mark."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._gone = stream, False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """For what asks the terminal for its width."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Hands the text on."""
        self._try(lambda: self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding)))
        return len(text)

    def flush(self) -> None:
        """Hands on what is kept."""
        self._try(self._stream.flush)

    def _try(self, work: Callable[[], object]) -> None:
        if not self._gone:
            try:
                work()
            except (OSError, ValueError):  # no such terminal any more, or a closed stream
                self._gone = True


class _LogFile(io.TextIOBase):
    """Takes the place of ``sys.stdout`` and ``sys.stderr``; without a name until there is a run folder.

    Args:
        terminal: also gets every line; None = the file alone.
    """

    encoding = "utf-8"

    def __init__(self, terminal: IO[str] | None) -> None:
        self._file: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._terminal = terminal

    def write(self, text: str) -> int:
        """Appends to the file at once: a killed run keeps its last lines."""
        for stream in filter(None, (self._file, self._terminal)):
            stream.write(text)
            stream.flush()
        return len(text)

    def fileno(self) -> int:
        """For libraries that hand the stream to another process."""
        return self._file.fileno()

    def move_to(self, path: Path) -> None:
        """Goes on in a named file, behind what it holds, with all lines up to now."""
        self._file.seek(0)
        with self._file as earlier:
            self._file = path.open("a", encoding="utf-8", errors="replace")
            self._file.write(earlier.read())
            self._file.flush()

    def close_file(self) -> None:
        """No line comes after this."""
        self._file.close()


class _Bars(Progress):
    """Bars, and under each the note that it has."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """The lines of the display."""
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if task.fields["note"]:
                yield Text(f"  {task.fields['note']}", style="dim", no_wrap=True, overflow="ellipsis")


class _Warnings(logging.Handler):
    """Shows this package's warnings on the terminal, and the errors of NeMo."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def emit(self, record: logging.LogRecord) -> None:
        """NeMo's own handler has the record for the log; the records of our loggers have none."""
        session = self._session
        if record.name != "nemo_logger":
            session.log.write(f"[{record.levelname[0]} {record.name}:{record.lineno}] {record.getMessage()}\n")
        ours = record.pathname.startswith(_PACKAGE)
        if not session.verbose and record.levelno >= (logging.WARNING if ours else logging.ERROR):
            session.show(f"{record.levelname.lower()}: {record.getMessage()}")


class Session:
    """The terminal of one job; :func:`quiet` makes it.

    Args:
        verbose: the terminal gets the libraries' lines too, and lines instead of bars.

    Attributes:
        log: what the libraries write.
        verbose: see above.
        console: rich's console on the standard error that was there, for lines of a caller's own.
        bars: whether progress is shown as a bar; on no terminal it is lines.
        in_training: whether the run takes steps, behind which it can be stopped.
        stop: number of the signal by which the run was asked to stop; 0 = none.
        on_signal: what answers signals while the run trains; None outside the main thread.
    """

    def __init__(self, *, verbose: bool) -> None:
        other_rank = any(os.environ.get(name, "0") not in ("", "0") for name in _RANKS)
        terminal: Any = _Terminal(sys.stderr)
        shown = io.StringIO() if other_rank else terminal
        self.verbose = verbose
        self.log = _LogFile(terminal if verbose else None)
        self.console = Console(file=shown, highlight=False, soft_wrap=True)
        self.bars = self.console.is_terminal and not verbose
        self.in_training, self.stop = False, 0
        self.on_signal: Callable[[int, Any], None] | None = None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        plain: Any = {"redirect_stdout": False, "redirect_stderr": False, "disable": not self.bars}
        self._progress = _Bars(*columns, console=self.console, transient=True, **plain)

    def show(self, text: str) -> None:
        """Prints a line, or several, above the bar; the log has them too."""
        if not self.verbose:
            self.log.write(f"{text}\n")
        self.console.print(text, markup=False)

    @contextmanager
    def bar(self, label: str, total: int | None, *, unit: str) -> Iterator[Callable[..., None]]:
        """Shows a bar while inside; on no terminal the label, once.

        Args:
            label: name of the work.
            total: number of units.
            unit: name of the units.

        Yields:
            A function that takes how many are done so far, and optionally ``note``, a line under the bar, and
            ``left``, a text behind it.
        """
        if not self.bars:
            self.show(f"{label} …")
        task = self._progress.add_task(label, total=total, unit=unit, note="", left="")
        self._progress.start()
        try:
            yield lambda done, **fields: self._progress.update(task, completed=done, **fields)
        finally:
            self._progress.remove_task(task)
            if not self._progress.tasks:
                self._progress.stop()

    @contextmanager
    def capturing(self) -> Iterator[Session]:
        """While inside, what is written to the standard streams goes to the log, also by handlers that hold them."""
        loggers, warnings = [logging.getLogger(name) for name in _LOGGERS], _Warnings(self)
        level, streams = loggers[0].level, (sys.stdout, sys.stderr)
        moved = _redirect({id(stream) for stream in (*streams, sys.__stdout__, sys.__stderr__)}, self.log)
        sys.stdout = sys.stderr = self.log
        loggers[0].setLevel(logging.INFO)
        for logger in loggers:
            logger.addHandler(warnings)
        try:
            yield self
        finally:
            sys.stdout, sys.stderr = streams
            for handler, stream in moved:
                handler.setStream(stream)
            _redirect({id(self.log)}, sys.stderr)  # of libraries that were imported meanwhile
            for logger in loggers:
                logger.removeHandler(warnings)
            loggers[0].setLevel(level)
            self.log.close_file()


def _redirect(streams: set[int], target: Any) -> list[tuple[Any, Any]]:
    """Every log handler that writes to one of the streams writes to another; gives (handler, what it wrote to)."""
    loggers = [logging.root, *logging.Logger.manager.loggerDict.values()]
    found = []
    for handler in [handler for logger in loggers for handler in getattr(logger, "handlers", ())]:
        # Handlers that look up `sys.stderr` at every line hold none.
        if isinstance(handler, logging.StreamHandler) and id(vars(handler).get("stream")) in streams:
            found.append((handler, handler.stream))
            handler.setStream(target)
    return found


_active: Session | None = None
_verbose = False


@contextmanager
def quiet(*, verbose: bool = False) -> Iterator[Session]:
    """While inside, the terminal shows this package's lines, warnings and bars only; inside another, that one.

    Everything else that is written to the standard streams goes to ``session.log``: a file without a name, until a
    run folder takes it. Errors are raised as ever.

    Args:
        verbose: the terminal gets all lines.
    """
    global _active
    if _active is not None:
        yield _active
        return
    _active = Session(verbose=verbose or _verbose)
    try:
        with _active.capturing() as session:
            yield session
    finally:
        _active = None


def be_verbose() -> None:
    """From now on every job of this process shows all lines."""
    global _verbose
    _verbose = True


def session() -> Session | None:
    """The job's terminal; None in the user's own program, where nothing is silenced."""
    return _active


def show(text: str) -> None:
    """Prints a line, or several, above the bar of the job; nothing in the user's own program."""
    if _active is not None:
        _active.show(text)


@contextmanager
def progress(label: str, total: int, *, unit: str = "utt") -> Iterator[Callable[..., None]]:
    """The bar of a job while inside (:meth:`Session.bar`); nothing in the user's own program."""
    with _active.bar(label, total, unit=unit) if _active else nullcontext(lambda done, **fields: None) as on_done:
        yield on_done


def track(items: Sequence[T], label: str, *, unit: str = "batches") -> Iterator[T]:
    """The items, with a bar that counts those that are done."""
    with progress(label, len(items), unit=unit) as on_done:
        for number, item in enumerate(items, 1):
            yield item
            on_done(number)
