"""Write the whole answers in docs/api.md: a digits server's answers to the requests there.

python -m bench.answers
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from bench.servers import running
from stepwise.recipe import read_recipe

DOCUMENT = Path(__file__).parents[1] / "docs" / "api.md"
EXCHANGE = re.compile(
    r"^```http\n(?P<request>(?:GET|POST) .*?)^```\n\n```http\n(?P<answer>.*?)^```$"
    r"(?P<of_recipe>\n\nThe recipe in it:\n\n```json\n(?P<recipe>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
_HASH = re.compile(r"[0-9a-f]{20,}")
_LONGEST = 100  # characters of a text
_WIDTH = 118
_NAMES = {"etag": "ETag", "x-request-id": "X-Request-ID"}


class Message(NamedTuple):
    """A request or an answer as text.

    Attributes:
        headers: by their names in small letters.
    """

    start: str
    headers: dict[str, str]
    body: str


def read(block: str) -> Message:
    """Parse a block of a document."""
    head, _, body = block.partition("\n\n")
    start, *lines = head.splitlines()
    return Message(start, {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}, body)


def renewed(text: str, client: httpx.Client) -> str:
    """The document with the present answers of a server."""

    def asked(exchange: re.Match[str]) -> str:
        request = read(exchange["request"])
        method, path = request.start.split()
        answer = client.request(method, path, headers=request.headers, content=request.body.encode())
        said = f"```http\n{exchange['request']}```\n\n```http\n{shown(answer)}\n```"
        if exchange["of_recipe"]:
            said += f"\n\nThe recipe in it:\n\n```json\n{laid_out(shortened(read_recipe(answer.content)))}\n```"
        return said

    return EXCHANGE.sub(asked, text)


def shown(answer: httpx.Response) -> str:
    """An answer as text: JSON formatted, long texts shortened, a PNG as its size."""
    lines = [f"HTTP/1.1 {answer.status_code} {answer.reason_phrase}"]
    for name, value in answer.headers.items():
        cut = {"etag": f'{value[:13]}…"', "x-request-id": f"{value[:8]}…"}.get(name, value)
        lines.append(f"{_NAMES.get(name, name.title())}: {cut}")
    media_type = answer.headers["content-type"]
    if "json" in media_type:
        body = laid_out(shortened(answer.json()))
    elif "event-stream" in media_type:
        body = re.sub(r"(?<=^data: ).*", _shortened_line, answer.text.strip(), flags=re.MULTILINE)
    else:
        body = f"(the bytes of the PNG, {len(answer.content):,})"
    return "\n".join([*lines, "", body])


def shortened(value: Any) -> Any:
    """JSON in which … replaces most of each long text."""
    match value:
        case dict():
            return {name: shortened(one) for name, one in value.items()}
        case list():
            return [shortened(one) for one in value]
        case str() if len(value) > _LONGEST or _HASH.fullmatch(value):
            return f"{value[:12]}…"
    return value


def laid_out(value: Any, indent: int = 0, before: int = 0) -> str:
    """JSON on lines of a readable length, with as many members on a line as fit.

    Args:
        indent: of the line on which the value begins.
        before: number of characters before the value on that line.
    """
    flat = json.dumps(value, ensure_ascii=False)
    if before + len(f"{flat},") <= _WIDTH or not isinstance(value, dict | list):
        return flat
    inner = indent + 2
    if isinstance(value, dict):
        names = {name: f"{json.dumps(name)}: " for name in value}
        members = [names[name] + laid_out(one, inner, inner + len(names[name])) for name, one in value.items()]
    else:
        members = [laid_out(one, inner, inner) for one in value]
    lines: list[str] = []
    for member in [*(f"{member}," for member in members[:-1]), members[-1]]:
        fits = lines and "\n" not in lines[-1] + member and inner + len(f"{lines[-1]} {member}") <= _WIDTH
        lines[-1:] = [f"{lines[-1]} {member}"] if fits else [*lines[-1:], member]
    opening, closed = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([opening, *(f"{' ' * inner}{line}" for line in lines), f"{' ' * indent}{closed}"])


def _shortened_line(line: re.Match[str]) -> str:
    return json.dumps(shortened(json.loads(line[0])), ensure_ascii=False)


def main() -> None:
    with (
        running(("digits", "service", {"STEPWISE_WEIGHTS": "digits"})) as [server],
        server.awake(),
        httpx.Client(base_url=server.url, trust_env=False, timeout=60) as client,
    ):
        DOCUMENT.write_text(renewed(DOCUMENT.read_text(), client))


if __name__ == "__main__":
    main()
