"""What a tagging would ask of a language model, before anything is paid."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from services.tagging.vlm import VLM_SIDE_PX, answer_schema, batches
from shared.llm.prices import Estimate, Price, estimate
from shared.llm.tokens import Detail, likely_tokens
from shared.prompting import Prompt
from shared.schema import Attribute, Category, Tagger

# What stands for a schema that is not made yet; the estimate says so.
_ATTRIBUTES, _TAGS = 40, 6


def usual_attributes() -> list[Attribute]:
    """As many attributes as schemas usually have, with names and tags of the usual length."""
    tags = tuple(f"usual tag {t}" for t in range(_TAGS))
    return [Attribute(f"usual attribute {a}", Category.GLOBAL, tags, Tagger.VLM) for a in range(_ATTRIBUTES)]


def estimate_tagging(
    price: Price, prompt: Prompt, asked: Iterable[tuple[int, Sequence[Attribute]]], detail: Detail
) -> Estimate:
    """The calls that tag images, each shown at its largest and answered at once.

    `asked` are numbers of instances, and the attributes that a language model is to tell of them.
    """
    total = Estimate(0, 0, 0, 0.0, price.currency)
    for count, attributes in asked:
        for batch in batches(attributes):
            answer = {a.name: max(a.tags, key=len) for a in batch}
            found = estimate(
                price,
                count,
                prompt.render(main_object="object", attributes=batch),
                output_tokens=likely_tokens(json.dumps(answer, ensure_ascii=False)),
                schema=answer_schema(batch),
                image_px=[(VLM_SIDE_PX, VLM_SIDE_PX)],
                detail=detail,
            )
            total += found
    return total
