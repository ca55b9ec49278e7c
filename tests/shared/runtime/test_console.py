"""Inside a command messages, progress and tables are printed; outside nothing is, and nothing global changes."""

import contextlib
import logging

import pytest
from mapet.shared.runtime.console import in_command, progress, results, running_command, say, table, working


def speak() -> None:
    say("100 % [done]")
    with progress("counting", 2) as advance:
        advance()
        advance(1, note="half way")
    with working("sorting"):
        pass
    table("Title", [("name", "value")])
    results.print("a result")


def test_a_command_prints_messages_to_stderr_and_results_to_stdout(capfd: pytest.CaptureFixture):
    assert in_command()
    speak()
    said = capfd.readouterr()
    assert said.err == "100 % [done]\nsorting ...\n"
    assert "Title" in said.out
    assert "value" in said.out
    assert said.out.endswith("a result\n")


def test_other_ranks_print_nothing(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    speak()
    assert capfd.readouterr() == ("", "")


def test_a_nested_command_prints_once_and_ends_with_the_outer_one(capfd: pytest.CaptureFixture):
    with running_command():
        say("once")
    say("still")
    assert capfd.readouterr().err == "once\nstill\n"


def test_records_of_other_libraries_stay_off_the_terminal(capfd: pytest.CaptureFixture):
    logging.getLogger("another.library").error("noise")
    assert capfd.readouterr().err == ""


def test_outside_a_command_messages_are_log_records_and_nothing_is_printed(caplog: pytest.LogCaptureFixture):
    assert not in_command()
    with caplog.at_level(logging.INFO, logger="mapet"):
        speak()
    assert [(record.name, record.levelno, record.getMessage()) for record in caplog.records] == [
        ("mapet", logging.INFO, "100 % [done]")
    ]


def test_a_command_leaves_logging_as_it_was():
    def state() -> list[object]:
        return [
            (list(logger.handlers), logger.level, logger.propagate, logger.disabled)
            for logger in (logging.root, logging.getLogger("mapet"))
        ]

    before = state()
    with contextlib.suppress(KeyError), running_command():
        assert state() != before
        raise KeyError
    assert state() == before
    assert not in_command()
