"""The instruction-based method: a language model names combinations that are likely to fail (paper 4.2, A.8).

It knows nothing of the model under debugging. Each question is about one class and, where the task is to tell classes
apart, about one class that it is taken for; what a task is about is said in its prompts alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.prediction.items import (
    MAX_PER_CLASS,
    MAX_PREDICTIONS,
    check_limits,
    class_of,
    within_caps,
)
from services.prediction.substitution import OBJECT
from shared import logs
from shared.errors import invalid
from shared.llm import LLM, Usage, WrongAnswer, together
from shared.prompting import Prompt, load_question
from shared.schema import MAIN_OBJECT, Schema

SERVICE = "prediction"
MAX_ASKED = 40  # combinations of one question

# Why a combination was left out.
ATTRIBUTE, TAG, PAIRS, TWICE = "unknown attribute", "unknown tag", "another number of pairs", "an attribute twice"
KNOWN, REPEATED = "known already", "named before"

log = logs.get("prediction.instruction")

Confusion = tuple[str, str]  # a class, and what it is taken for
IsUnseen = Callable[[Sequence[int]], bool]


@dataclass(frozen=True)
class Questions:
    """The prompts of one task; `targets` is None where the task is not to tell classes apart."""

    combinations: Prompt
    targets: Prompt | None

    @property
    def digests(self) -> Mapping[str, str]:
        """The digest of each prompt, by `prediction/<name>`."""
        asked = (self.combinations, self.targets)
        return {f"{SERVICE}/{prompt.name}": prompt.digest for prompt in asked if prompt is not None}


@dataclass
class Tally:
    """How far the questions are, and what was paid."""

    done: int = 0
    total: int = 0
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True)
class Instructed:
    """Combinations that a language model named, the first of each answer first; P rows."""

    items: NDArray[np.int32]  # (P, pairs) ascending
    score: NDArray[np.float64]  # (P,) sum of 1 / place over the answers that name it
    target: tuple[str, ...]  # (P,) what the class is taken for, of the answer that names it first; "" for none
    dropped: Mapping[str, int]  # combinations that were left out, by reason
    question_count: int
    usage: Usage

    def __len__(self) -> int:
        return len(self.score)


def load_questions(root: Path, task: str) -> Questions:
    """The prompts of `task` in the folder of prompts `root`: targets are asked for where there is `targets.<task>.md`.

    Raises NotFound when one is not there, InvalidInput when one cannot be read or says no form for its answer.
    """

    asks = (root / SERVICE / f"targets.{task}.md").is_file()
    return Questions(
        load_question(SERVICE, "combinations", task, root=root),
        load_question(SERVICE, "targets", task, root=root) if asks else None,
    )


def confusions(labels: Iterable[str | None], predicted: Iterable[str | None], per_class: int) -> list[Confusion]:
    """What each class is taken for most often, at most `per_class` each; those that most come of come first.

    `labels` and `predicted` are those of the same instances, None where not known. Each class has its first before any
    has its second; equally frequent ones come in the order of their names.
    """
    taken_for = Counter((a, b) for a, b in zip(labels, predicted, strict=True) if a and b and a != b)
    place: Counter[str] = Counter()
    ranked: list[tuple[int, int, Confusion]] = []
    for pair, count in sorted(taken_for.items(), key=lambda item: (-item[1], item[0])):
        if place[pair[0]] < per_class:
            ranked.append((place[pair[0]], -count, pair))
            place[pair[0]] += 1
    return [pair for _, _, pair in sorted(ranked)]


async def ask_combinations(
    llm: LLM,
    questions: Questions,
    schema: Schema,
    *,
    pair_count: int,
    is_unseen: IsUnseen,
    known_confusions: Sequence[Confusion] = (),
    max_questions: int = 100,
    max_per_class: int = MAX_PER_CLASS,
    max_predictions: int = MAX_PREDICTIONS,
    tell: Callable[[Tally], None] = lambda tally: None,
) -> Instructed:
    """Ask for combinations of `pair_count` pairs, the class among them where it is an attribute of `schema`.

    Classes that `known_confusions` do not tell of are asked about first, where the task has a question for that.
    A combination that does not fit the schema is sent back once with what is wrong, then left out and counted; so is
    one that `is_unseen` denies. The rest are ranked by their place in the answers (ties: the earlier question), cut to
    `max_per_class` for each class and for those that name none, and to `max_predictions` in all.

    Raises InvalidInput (a limit < 1, more pairs than attributes), WrongAnswer with what was spent when no answer is of
    use, and what `LLM.ask` raises.
    """
    check_limits(max_questions=max_questions, max_per_class=max_per_class, max_predictions=max_predictions)
    reader = _Reader(schema, pair_count)
    asker = _Asker(llm, tell)
    asked = await _about(asker, questions.targets, reader.classes, known_confusions, max_questions)
    asker.expect(len(asked))
    share = Counter(main_object for main_object, _ in asked)  # questions of each class
    # Twice as many as are kept: some will be known already.
    wanted = [-(-2 * max_per_class // share[main_object]) for main_object, _ in asked]
    answers = await together(
        [
            _ask(asker, questions.combinations, reader, pair, is_unseen, min(count, MAX_ASKED))
            for pair, count in zip(asked, wanted, strict=True)
        ]
    )
    useful = [(pair, answer) for pair, answer in zip(asked, answers, strict=True) if answer is not None]
    if not useful:
        raise WrongAnswer(
            f"the model '{llm.settings.model}' gave no answer of use to {len(asked)} questions; try a stronger model",
            usage=asker.tally.usage,
        )
    found: dict[tuple[int, ...], tuple[float, str]] = {}
    dropped: Counter[str] = Counter()
    for (_, target), answer in useful:
        dropped.update(answer.dropped)
        for place, items in answer.combinations:
            score, first = found.get(items, (0.0, target))
            found[items] = (score + 1 / (1 + place), first)
    rows = np.array(list(found), np.int32).reshape(-1, pair_count)
    scores = np.array([score for score, _ in found.values()], np.float64)
    order = np.argsort(-scores, kind="stable")
    order = order[within_caps(class_of(schema, rows[order]), max_per_class, max_predictions)]
    targets = [target for _, target in found.values()]
    return Instructed(
        rows[order], scores[order], tuple(targets[i] for i in order), dict(dropped), len(asked), asker.tally.usage
    )


@dataclass(frozen=True)
class _Answer:
    """What of one answer is of use: items and place of each combination; and why the others are not."""

    combinations: Sequence[tuple[int, tuple[int, ...]]]
    dropped: Mapping[str, int]


class _Reader:
    """Reads combinations of pairs in words; knows the schema."""

    def __init__(self, schema: Schema, pair_count: int) -> None:
        words = schema.pairs
        self.attributes = [a for a in schema.attributes if a.name != MAIN_OBJECT]
        self._class_items = {tag: i for i, (attribute, tag) in enumerate(words) if attribute == MAIN_OBJECT}
        self.classes = tuple(self._class_items) or schema.main_objects or (OBJECT,)
        self.asked = pair_count - bool(self._class_items)  # pairs beside the class
        if not 1 <= self.asked <= len(self.attributes):
            raise invalid("pair_count", f"is {pair_count}; the schema has {len(self.attributes)} attributes to combine")
        self._items: dict[str, dict[str, int]] = {}
        for i, (attribute, tag) in enumerate(words):
            if attribute != MAIN_OBJECT:
                of_it = self._items.setdefault(attribute, {})
                of_it[tag] = i
                of_it.setdefault(_folded(tag), i)
        self._names = {_folded(name): name for name in self._items}

    def read(self, pairs: Sequence[Mapping[str, str]], main_object: str) -> tuple[tuple[int, ...], str, str]:
        """The items of a combination of `main_object`, or why it is none, in a word and as it is told to a model."""
        if len(pairs) != self.asked:
            return (), PAIRS, f"has {len(pairs)} pairs; give exactly {self.asked}"
        items = [self._class_items[main_object]] if main_object in self._class_items else []
        seen: set[str] = set()
        for pair in pairs:
            said = pair["attribute"]
            name = said if said in self._items else self._names.get(_folded(said))
            if name is None:
                return (), ATTRIBUTE, f"names '{said[:80]}', which is no attribute of the list"
            if name in seen:
                return (), TWICE, f"has '{name}' twice"
            seen.add(name)
            tags = self._items[name]
            item = tags.get(pair["tag"], tags.get(_folded(pair["tag"])))
            if item is None:
                return (), TAG, f"names '{pair['tag'][:80]}', which is no tag of '{name}'"
            items.append(item)
        return tuple(sorted(items)), "", ""

    def taken(self, answer: Any, main_object: str, is_unseen: IsUnseen) -> tuple[_Answer, list[str]]:
        """What of `answer` is of use, and what is wrong with it."""
        kept: dict[tuple[int, ...], int] = {}
        dropped: Counter[str] = Counter()
        problems: list[str] = []
        for place, combination in enumerate(answer["combinations"]):
            items, why, told = self.read(combination["pairs"], main_object)
            if why:
                problems.append(f"combination {place + 1} {told}")
            elif items in kept:
                why = REPEATED
            elif not is_unseen(items):
                why = KNOWN
            else:
                kept[items] = place
            dropped[why] += bool(why)
        if not kept and not problems:
            problems.append("none of the combinations is new: the data shows them all; name rarer ones")
        return _Answer([(place, items) for items, place in kept.items()], +dropped), problems


class _Asker:
    """Asks one model and counts."""

    def __init__(self, llm: LLM, tell: Callable[[Tally], None]) -> None:
        self._llm = llm
        self._tell = tell
        self.tally = Tally()

    def expect(self, count: int) -> None:
        self.tally.total += count
        self._tell(self.tally)

    async def ask(self, prompt: Prompt, inputs: Mapping[str, Any], check: Callable[[Any], list[str]]) -> Any:
        """The answer, also one that is still wrong in parts after its correction; None for one that is of no use."""
        try:
            with prompt.in_logs():
                reply = await self._llm.ask(
                    prompt.render(**inputs),
                    prompt.schema or {},
                    check,
                    name=prompt.name,
                    temperature=prompt.settings.temperature,
                    max_tokens=prompt.settings.max_tokens,
                )
        except WrongAnswer as wrong:
            self.tally.usage += wrong.usage
            log.warning("answer of no or partial use", reason=wrong.reason, problems=list(wrong.problems[:10]))
            return wrong.value
        else:
            self.tally.usage += reply.usage
            return reply.value
        finally:
            self.tally.done += 1
            self._tell(self.tally)


async def _about(
    asker: _Asker, prompt: Prompt | None, classes: Sequence[str], known: Sequence[Confusion], most: int
) -> list[Confusion]:
    """At most `most` (class, what it is taken for) to ask about; with "" where the task is not to tell them apart."""
    if prompt is None:
        return [(main_object, "") for main_object in classes[:most]]
    told = [pair for pair in known if pair[0] in classes]
    first = dict.fromkeys(main_object for main_object, _ in told)
    missing = [main_object for main_object in classes if main_object not in first][: max(most - len(first), 0)]
    if not missing:
        return told[:most]

    def usable(answer: Any) -> dict[str, str]:
        named = ((item["main_object"], " ".join(item["other"].split())[:60]) for item in answer["targets"])
        return {a: b for a, b in reversed(list(named)) if b and a.casefold() != b.casefold()}  # of several the first

    def check(answer: Any) -> list[str]:
        left = [main_object for main_object in missing if main_object not in usable(answer)]
        return [f"nothing other is named for '{main_object}'" for main_object in left]

    asker.expect(1)
    answer = await asker.ask(prompt, {"classes": list(classes), "main_objects": missing}, check)
    others = usable(answer) if answer is not None else {}
    named = [(main_object, others.get(main_object, "")) for main_object in missing]
    return [*told[: len(first)], *named, *told[len(first) :]][:most]


async def _ask(
    asker: _Asker, prompt: Prompt, reader: _Reader, pair: Confusion, is_unseen: IsUnseen, count: int
) -> _Answer | None:
    main_object, target = pair
    inputs = {
        "main_object": main_object,
        "target": target,
        "pairs": reader.asked,
        "count": count,
        "attributes": [{"name": a.name, "category": a.category.value, "tags": a.tags} for a in reader.attributes],
    }
    answer = await asker.ask(prompt, inputs, lambda answer: reader.taken(answer, main_object, is_unseen)[1])
    return None if answer is None else reader.taken(answer, main_object, is_unseen)[0]


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
