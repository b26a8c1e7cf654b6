"""The same spine with a language model in place of the measured schema: a scripted one, over real HTTP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hibug2.v1 import types_pb2
from tests.scripted_llm import ScriptedLLM


def test_a_run_with_a_language_model(start_platform: Callable[..., Any], images: Path) -> None:
    lines = (images / "manifest.csv").read_text().splitlines()
    validation = [line for line in lines if '"validation"' in line or line.endswith("validation")]
    (images / "few.csv").write_text("\n".join([lines[0], *validation[:120]]) + "\n")
    ids = {line.split(",")[0] for line in validation[:120]}
    said = (images / "v1.csv").read_text().splitlines()
    (images / "few-v1.csv").write_text("\n".join([said[0], *(s for s in said if s.split(",")[0] in ids)]) + "\n")
    with ScriptedLLM() as llm:
        settings = {"llm_base_url": llm.base_url, "llm_model": "scripted", "llm_api_key": "secret-key"}
        with start_platform(images, settings=settings) as platform, platform.client() as client:
            client.create_dataset("few", images / "few.csv")
            client.add_scores("few", "v1", images / "few-v1.csv")
            run = client.run("few", "v1", depth=2)
            schema = client.schema("few")
            asked = [a for a in schema.attributes if a.tagger == types_pb2.TAGGER_VLM]
            assert {a.category for a in asked} == {
                types_pb2.CATEGORY_MAIN_OBJECT,
                types_pb2.CATEGORY_BACKGROUND,
                types_pb2.CATEGORY_GLOBAL,
            }
            assert all(len(a.tags) >= 2 for a in asked)
            # Images were compared, the classes that v1 takes for one another asked about, and tags looked for.
            assert {source for a in asked for source in a.sources} == {"direct", "comparison", "difficulty"}
            assert any(len(call.images) == 2 for call in llm.calls)
            said = [str(call.body["messages"][-1]["content"]) for call in llm.calls]
            assert any("Main object: Shirt" in text and "Is taken for: Coat" in text for text in said)
            slices = client.slices(run.enumeration).to_pylist()
            words = {pair["attribute"] for row in slices for pair in row["tags"]}
            assert words & {a.attribute for a in asked}
            tagging = next(step for step in run.steps if step.job.name == run.tagging)
            assert tagging.job.cost.call_count == 120
            taggings = len(llm.calls)
            # Nothing is paid twice: the second run asks nothing.
            client.run("few", "v1", depth=2, margin=0.1)
            assert len(llm.calls) == taggings
            # Asked for anew, the locked attribute stays to the letter and the user's own gets its tags.
            kept = asked[0]
            client.edit_schema("few", [("lock", kept.attribute)])
            steps: list[str] = []
            made = client.generate_schema(
                "few",
                attributes=["object sleeve"],
                pair_count=2,
                image_count=4,
                on_progress=lambda j: steps.append(j.step),
            )
            found = {a.attribute: a for a in made.schema.attributes}
            assert found[kept.attribute].locked
            assert found[kept.attribute].tags == kept.tags
            assert len(found["object sleeve"].tags) >= 2
            assert "user" in found["object sleeve"].sources
            assert made.compared_pair_count <= 2
            assert steps
            assert client.schema("few").name == made.schema.name
