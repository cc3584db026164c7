"""The terminal shows our lines; everything that libraries write goes to the log file."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest

from nemo_llm_feedback.core import console
from nemo_llm_feedback.training.callbacks.run_bar import RunClock


def test_the_terminal_has_our_lines_and_the_log_has_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = logging.Logger("a library")
    logging.Logger.manager.loggerDict["a library"] = library
    library.addHandler(logging.StreamHandler(sys.stderr))
    with console.quiet() as session:
        library.warning("of a handler that was there before")
        print("a print")
        late = logging.StreamHandler(sys.stderr)
        library.addHandler(late)
        session.log.move_to(tmp_path / "log.txt")
        print("behind the move", file=sys.stderr)
        console.show("a line of ours")
        with console.quiet() as same:
            assert same is session
        with console.progress("transcribing", 3) as done:
            done(1)
        assert list(console.track([1, 2], "measuring")) == [1, 2]
    print("the result")
    library.warning("outside")
    found, log = capsys.readouterr(), (tmp_path / "log.txt").read_text()
    assert found.out == "the result\n"
    assert found.err.splitlines() == ["a line of ours", "transcribing …", "measuring …", "outside", "outside"]
    for words in ("of a handler", "a print", "behind the move", "a line of ours"):
        assert words in log, words
    assert late.stream is sys.stderr
    del logging.Logger.manager.loggerDict["a library"]


def test_warnings_of_ours_and_errors_of_nemo_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    nemo, ours = logging.getLogger("nemo_logger"), logging.getLogger("nemo_llm_feedback.some")
    path = str(Path(console.__file__).parents[1] / "training" / "setup.py")
    with console.quiet():
        for name, file in (("of NeMo", "nemo/core.py"), ("of ours by NeMo's logger", path)):
            for level in (logging.INFO, logging.WARNING, logging.ERROR):
                nemo.handle(logging.LogRecord("nemo_logger", level, file, 1, name, (), None))
        ours.handle(logging.LogRecord(ours.name, logging.WARNING, path, 1, "of ours", (), None))
    assert [line for line in capsys.readouterr().err.splitlines() if ": of " in line] == [
        "error: of NeMo",
        "warning: of ours by NeMo's logger",
        "error: of ours by NeMo's logger",
        "warning: of ours",
    ]


def test_verbose_brings_everything_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console.quiet(verbose=True):
        print("a print of a library")
    assert "a print of a library" in capsys.readouterr().err


def test_in_a_program_of_the_users_nothing_is_silenced(capsys: pytest.CaptureFixture[str]) -> None:
    console.show("not shown")
    assert list(console.track([1, 2], "not shown")) == [1, 2]
    print("a print")
    assert capsys.readouterr() == ("a print\n", "")


def test_the_time_left_counts_the_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    clock = RunClock(total=20, every=5)
    for step in range(1, 11):
        now += 2.0 + (30.0 if step % 5 == 0 else 0.0)
        clock.tick(step, measured=step % 5 == 0)
    assert clock.left() == pytest.approx(10 * 2.0 + 2 * 30.0)


class _Closed(io.StringIO):
    """A terminal that goes away: it takes one write."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error, self.writes = error, 0

    def write(self, text: str) -> int:
        self.writes += 1
        if self.writes > 1:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error")])
def test_a_terminal_or_a_reader_that_goes_away_does_not_end_the_work(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C behind `| tee` ended a run in the middle of its step, without a checkpoint."""
    monkeypatch.setattr(sys, "stderr", _Closed(error))
    with console.quiet() as session:
        session.log.move_to(tmp_path / "log.txt")
        for number in range(3):
            console.show(f"line {number}")
        with console.progress("transcribing", 3) as done:
            done(1)
    log = (tmp_path / "log.txt").read_text()
    assert all(line in log for line in ("line 0", "line 1", "line 2", "transcribing"))


def test_a_sign_that_the_terminal_lacks_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="latin-1", write_through=True))
    with console.quiet():
        console.show("WER ↓ für Größe")
    assert raw.getvalue().decode("latin-1").splitlines() == ["WER ? für Größe"]
