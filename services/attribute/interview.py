"""The conversation with a language model: every answer checked, every call counted, the progress told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.attribute.questions import form_of
from shared import logs
from shared.llm import LLM, Check, Usage, WrongAnswer
from shared.prompting import Prompt

log = logs.get("attribute.interview")


@dataclass
class Tally:
    """How far the interview is: questions done of those known so far, and what was paid."""

    step: str = ""
    done: int = 0
    total: int = 0
    usage: Usage = field(default_factory=Usage)


class Interview:
    """Asks one model; `tell` hears of every change of the tally."""

    def __init__(self, llm: LLM, tell: Callable[[Tally], None] = lambda tally: None) -> None:
        self.llm = llm
        self.tally = Tally()
        self.places = asyncio.Semaphore(llm.settings.max_concurrency)  # for questions that hold images meanwhile
        self._tell = tell

    def begin(self, step: str) -> None:
        self.tally.step = step
        self._tell(self.tally)

    def expect(self, count: int) -> None:
        """`count` questions more are ahead; less, where it is negative."""
        self.tally.total += count
        self._tell(self.tally)

    async def ask(
        self,
        prompt: Prompt,
        inputs: Mapping[str, Any],
        *,
        form: Mapping[str, Any] | None = None,
        check: Check = lambda _: [],
        images: Sequence[bytes] = (),
    ) -> Any:
        """The answer to `prompt`, one of the questions that were expected.

        An answer that is still wrong in parts after its correction is taken: the normaliser leaves those parts out.
        Raises what `LLM.ask` raises, WrongAnswer with what was spent in all so far.
        """
        settings = prompt.settings
        try:
            with prompt.in_logs():
                reply = await self.llm.ask(
                    prompt.render(images=images, **inputs),
                    form_of(prompt) if form is None else form,
                    check,
                    name=prompt.name,
                    temperature=settings.temperature,
                    max_tokens=settings.max_tokens,
                )
        except WrongAnswer as wrong:
            self.tally.usage += wrong.usage
            wrong.usage = self.tally.usage
            if wrong.value is None:
                raise
            with prompt.in_logs():
                log.warning("answer used in part", problems=list(wrong.problems[:10]))
            return wrong.value
        else:
            self.tally.usage += reply.usage
            return reply.value
        finally:
            self.tally.done += 1
            self._tell(self.tally)

    async def try_ask(self, prompt: Prompt, inputs: Mapping[str, Any], **more: Any) -> Any | None:
        """As `ask`, for one question of many: None when its answer is of no use."""
        try:
            return await self.ask(prompt, inputs, **more)
        except WrongAnswer as wrong:
            with prompt.in_logs():
                log.warning("question passed over", reason=wrong.reason, error=str(wrong))
            return None
