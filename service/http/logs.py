"""JSON log lines on standard output, and request ids."""

import datetime
import json
import logging
import re
import sys
import traceback
import uuid

access = logging.getLogger("service.access")

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


def request_id(sent: str = "") -> str:
    """The id of a request: the client's own id if it is sane, else a new one."""
    return sent if _SANE_ID.fullmatch(sent) else uuid.uuid4().hex


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, message, and the fields of the caller's `extra={"fields": {…}}`."""

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
    """An error's kind and stack, without its message. The message may quote the client's input."""
    trace = traceback.TracebackException.from_exception(error)
    lines = [f"{type(error).__name__}\n", *trace.stack.format()]
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "".join(lines) + ("" if cause is None else f"after {trace_without_messages(cause)}")


def configure() -> None:
    """Send all logs to standard output. middleware.py writes one line a request, so uvicorn's access log is off."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn.access").disabled = True
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # the library warns about each broken form
