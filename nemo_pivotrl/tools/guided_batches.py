"""What stands behind `serve-guided`: one thread that decodes waiting answers in batches, and the text of each as it grows.

Batches are simple: the thread takes what waits (up to `max_batch` answers and `batch_tokens` tokens), decodes it to the
end, and takes the next batch. An answer whose caller has gone, or whose stop string appeared, leaves its batch at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nemo_pivotrl.backends.reference.guided import GuidedGenerator, Steering, Token
from nemo_pivotrl.data.chat_template import Chat

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer makes of the first bytes of a character."""


class Busy(Exception):
    """Too many answers wait."""


@dataclass
class Growing:
    """The text of an answer, token by token: what may be shown now, and whether a stop string ended it."""

    decode: Callable[[Sequence[int]], str]
    stops: tuple[str, ...] = ()
    ids: list[int] = field(default_factory=list)
    text: str = ""
    """All that was given out."""
    stopped: bool = False

    def add(self, token: int | None, last: bool) -> str:
        """The new piece of text after `token` (None: one that has no text). Only at the `last` is nothing held back."""
        if token is not None:
            self.ids.append(token)
        whole = self.decode(self.ids)
        found = [place for stop in self.stops if (place := whole.find(stop)) >= 0]
        if found:
            self.stopped, whole = True, whole[: min(found)]
        elif not last:
            whole = whole.rstrip(UNFINISHED)
            whole = whole[: len(whole) - max((_begun(whole, stop) for stop in self.stops), default=0)]
        piece = whole[len(self.text) :]
        self.text += piece
        return piece


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True, slots=True)
class Piece:
    """News of one answer. The last has a finish reason, or an error."""

    choice: int
    text: str = ""
    token: Token | None = None
    finish_reason: str | None = None
    error: str | None = None


@dataclass
class Job:
    """One answer that somebody waits for."""

    choice: int
    prompt: Sequence[int]
    own_prompts: Mapping[str, Sequence[int]]
    request: Steering
    growing: Growing
    emit: Callable[[Piece], None]
    """Called from the decoding thread."""
    gone: bool = False
    """Set by the caller, who no longer listens."""

    @property
    def width(self) -> int:
        return len(self.prompt) + self.request.max_new_tokens


class Batches:
    """The decoding thread and its queue."""

    def __init__(self, generator: GuidedGenerator, chat: Chat, max_batch: int, max_waiting: int, num_threads: int = 0):
        self.generator, self.chat = generator, chat
        self.max_batch, self.max_waiting, self.num_threads = max_batch, max_waiting, num_threads
        self.waiting: deque[Job] = deque()
        self.changed = threading.Condition()
        self.closing = False
        self.sizes: deque[int] = deque(maxlen=1000)
        """Answers in each of the latest batches."""
        self.thread = threading.Thread(target=self._run, name="guided", daemon=True)
        self.thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Let them wait together. Raises Busy when there are too many."""
        with self.changed:
            if len(self.waiting) + len(jobs) > self.max_waiting:
                raise Busy(f"{len(self.waiting)} answers wait; at most {self.max_waiting} may")
            self.waiting.extend(jobs)
            self.changed.notify()

    def close(self) -> None:
        """End the thread after the token it is at."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join(timeout=30)

    def _run(self) -> None:
        if self.num_threads:
            torch.set_num_threads(self.num_threads)  # torch keeps the number by thread
        while batch := self._next():
            self.sizes.append(len(batch))
            try:
                self._decode(batch)
            except Exception as error:  # a thread that dies would leave every caller waiting for ever
                for job in batch:
                    job.emit(Piece(job.choice, error=f"{type(error).__name__}: {error}"))

    def _next(self) -> list[Job]:
        with self.changed:
            while not self.waiting and not self.closing:
                self.changed.wait()
            batch: list[Job] = []
            while self.waiting and not self.closing and len(batch) < self.max_batch:
                widest = max(job.width for job in [*batch, self.waiting[0]])
                if batch and widest * (len(batch) + 1) > self.generator.batch_tokens:
                    break
                batch.append(self.waiting.popleft())
            return batch

    def _decode(self, batch: Sequence[Job]) -> None:
        decoding = self.generator.start(
            [job.prompt for job in batch], [job.request for job in batch], [job.own_prompts for job in batch]
        )
        while not decoding.done:
            if self.closing:
                raise RuntimeError("the server is closing")
            for row, job in enumerate(batch):
                if job.gone:
                    decoding.stop(row)
            if decoding.done:
                return
            for row, token, reason in decoding.step():
                job = batch[row]
                shown = None if reason == "stop" else token.token_id
                text = job.growing.add(shown, last=reason is not None)
                ended = "stop" if job.growing.stopped else reason
                if job.growing.stopped:
                    decoding.stop(row)
                job.emit(Piece(job.choice, text, token, ended))


def figures(tokens: Sequence[Token]) -> dict[str, Any]:
    """What guidance did to an answer."""
    count = max(1, len(tokens))
    return {
        "kl": round(sum(t.kl for t in tokens) / count, 6),
        "changed": round(sum(t.changed_token for t in tokens) / count, 6),
    }
