"""Logs are JSON, one object a line."""

import datetime
import json
import logging
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.http import logs
from service.http.logs import JsonLines


def a_record(message: str, *args: object, **more: object) -> logging.LogRecord:
    return logging.makeLogRecord(
        {"name": "service", "levelno": logging.INFO, "levelname": "INFO", "msg": message, "args": args, **more}
    )


def parsed(record: logging.LogRecord) -> dict[str, object]:
    text = JsonLines().format(record)
    assert text.splitlines() == [text]
    line = json.loads(text)
    assert isinstance(line, dict)
    return line


def test_a_line_has_time_level_and_message() -> None:
    assert parsed(a_record("%s of %d", "one", 2, created=0.25, levelname="WARNING")) == {
        "time": "1970-01-01T00:00:00.250Z",
        "level": "warning",
        "message": "one of 2",
    }


def test_time_can_be_read_back() -> None:
    record = a_record("now")
    time = datetime.datetime.fromisoformat(str(parsed(record)["time"]))
    assert time.tzinfo is not None
    assert abs(time.timestamp() - record.created) <= 0.001


def test_fields_stand_beside_the_message() -> None:
    line = parsed(a_record("done", fields={"status": 200, "duration_ms": 1.5, "client": None}))
    assert (line["message"], line["status"], line["duration_ms"], line["client"]) == ("done", 200, 1.5, None)


def test_a_field_that_json_does_not_know_is_told_as_text() -> None:
    assert parsed(a_record("done", fields={"error": ValueError("odd")}))["error"] == "odd"


def break_down() -> None:
    raise ValueError("first line\nsecond line")


def test_an_exception_is_one_field_with_its_traceback() -> None:
    try:
        break_down()
    except ValueError:
        line = parsed(a_record("it failed", exc_info=sys.exc_info()))
    exception = str(line["exception"])
    assert line["message"] == "it failed"
    assert exception.startswith("Traceback (most recent call last):\n")
    assert "test_logs.py" in exception
    assert exception.endswith("ValueError: first line\nsecond line")


@given(st.text(), st.dictionaries(st.text(), st.text() | st.integers() | st.none()))
def test_any_text_stays_on_its_line(text: str, fields: dict[str, object]) -> None:
    line = parsed(a_record("%s", text, fields={"fields": fields}))
    assert line["message"] == text
    assert line["fields"] == fields


@pytest.fixture
def _own_logging() -> Iterator[None]:
    """Restores the loggers at the end."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    others = [logging.getLogger(name) for name in ("uvicorn.access", "uvicorn.error", "python_multipart")]
    before = [(logger.disabled, logger.level) for logger in others]
    root.handlers.clear()  # otherwise `configure` would close pytest's handlers
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for logger, (disabled, level_before) in zip(others, before, strict=True):
        logger.disabled, logger.level = disabled, level_before


@pytest.mark.usefixtures("_own_logging")
def test_all_logs_go_to_standard_output_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    logging.getLogger("anything").info("hello")
    logging.getLogger("anything").debug("too small")
    logs.access.info("%s %s", "GET", "/", extra={"fields": {"status": 200}})
    logging.getLogger("uvicorn.access").info("we have our own")
    logging.getLogger("uvicorn.error").info("Started server process")
    try:
        break_down()
    except ValueError:
        logging.getLogger("service.engine.engine").exception("the engine died")
    output = capsys.readouterr()
    lines = [json.loads(line) for line in output.out.splitlines()]
    assert [line["message"] for line in lines] == ["hello", "GET /", "the engine died"]
    assert lines[1]["status"] == 200
    assert lines[2]["level"] == "error"
    assert "ValueError: first line" in lines[2]["exception"]
    assert output.err == ""
