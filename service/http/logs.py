"""Logs as JSON lines on standard output."""

import datetime
import json
import logging
import sys
import traceback

access = logging.getLogger("service.access")


class JsonLines(logging.Formatter):
    """One JSON object a line. What a caller passes as `extra={"fields": {…}}` stands beside time, level and message."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, object] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def trace_without_messages(error: BaseException) -> str:
    """Where an error was raised, and its kind, for an error whose message may quote what a client sent."""
    trace = traceback.TracebackException.from_exception(error)
    lines = [f"{type(error).__name__}\n", *trace.stack.format()]
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "".join(lines) + ("" if cause is None else f"after {trace_without_messages(cause)}")


def configure() -> None:
    """Send all logs to standard output. uvicorn's own access log is off: middleware.py writes one line a request."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn.access").disabled = True
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every broken form
