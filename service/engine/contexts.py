"""The contexts of texts that were encoded lately, by content, in bounded memory."""

import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from model.rows import Context, Row, Text

_BYTES = 64 * 2**20


class Contexts:
    """Keeps contexts. The one that was asked for least recently makes room. Any thread may call at any time.

    Args:
        most: bytes of all contexts together.
    """

    def __init__(self, most: int = _BYTES) -> None:
        self._most = most
        self._lock = threading.Lock()  # guards the state below
        self._bytes = 0
        self._by_text: dict[Text, Context] = {}  # least recently asked for first

    def find(self, text: Text) -> Context | None:
        """The context of a text; None if it is not kept."""
        with self._lock:
            context = self._by_text.pop(text, None)
            if context is not None:
                self._by_text[text] = context
            return context

    def find_all(self, texts: Iterable[Text]) -> dict[Text, Context]:
        """The contexts that are kept of these texts."""
        found = ((text, self.find(text)) for text in texts)
        return {text: context for text, context in found if context is not None}

    def keep(self, text: Text, context: Context) -> None:
        """Keep the context of a text that is not kept yet. A context larger than all the room is not kept."""
        if context.nbytes > self._most:
            return
        with self._lock:
            if text in self._by_text:
                return
            self._bytes += context.nbytes
            self._by_text[text] = context
            while self._bytes > self._most:
                self._bytes -= self._by_text.pop(next(iter(self._by_text))).nbytes


class Prompts(NamedTuple):
    """The texts of a request.

    Attributes:
        contexts: those that are known, by text. The engine adds the others.
        unknown: the texts that must be encoded first.
    """

    contexts: dict[Text, Context]
    unknown: Sequence[Text]

    @classmethod
    def of(cls, rows: Iterable[Row], contexts: Contexts) -> "Prompts":
        texts = list(dict.fromkeys(text for row in rows for text in row.texts))
        known = contexts.find_all(texts)
        return cls(known, [text for text in texts if text not in known])

    def given_to(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows with the contexts of their texts."""
        return [row.with_contexts(self.contexts) if row.texts else row for row in rows]
