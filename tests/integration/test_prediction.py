"""The prediction service over gRPC: every method from creation to verification, and what it refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from hibug2.v1 import prediction_pb2 as pb
from hibug2.v1 import prediction_pb2_grpc as rpc
from hibug2.v1 import types_pb2
from services.prediction.config import Settings
from services.prediction.server import start_server
from shared.errors import HiBug2Error, InvalidInput, NotFound, Precondition
from shared.llm import Account, Ledger
from shared.rpc import status
from shared.store.artifacts import Artifacts
from shared.store.store import Store
from tests.scripted_llm import MODEL, Fault, ScriptedLLM
from tests.unit.prediction.conftest import POOL_TAGGING, ranked_world
from tests.unit.shared.world import ENUMERATION, RANKING, TAGGING

METHODS = {
    "tag_substitution": pb.PREDICTION_METHOD_TAG_SUBSTITUTION,
    "instruction": pb.PREDICTION_METHOD_INSTRUCTION,
    "prior": pb.PREDICTION_METHOD_PRIOR,
}
DATASET = "datasets/pets"


class Caller:
    """Calls that raise the platform's errors."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = rpc.PredictionServiceStub(channel)

    async def __call__(self, method: str, request: Any) -> Any:
        try:
            return await getattr(self._stub, method)(request)
        except grpc.aio.AioRpcError as failure:
            raise status.error_of(failure) from failure

    async def create(self, method: str, /, **given: Any) -> types_pb2.Job:
        """The job of a prediction when it has ended."""
        asked = {"parent": DATASET, "ranking": str(RANKING), "method": METHODS[method]} | given
        request = pb.CreatePredictionRequest(**asked)
        job = (await self("CreatePrediction", request)).job
        async for response in self._stub.WatchPrediction(pb.WatchPredictionRequest(name=job.name)):
            job = response.job
        return job

    async def listed(self, name: str) -> list[pb.PredictedSlice]:
        first = await self("ListPredictedSlices", pb.ListPredictedSlicesRequest(parent=name, page_size=2))
        request = pb.ListPredictedSlicesRequest(parent=name, page_token=first.next_page_token)
        rest = (await self("ListPredictedSlices", request)).predicted_slices if first.next_page_token else []
        return [*first.predicted_slices, *rest]

    async def verify(self, *names: str, **given: Any) -> pb.VerifyPredictionsResponse:
        pool = {
            "tagging": str(POOL_TAGGING),
            "model": f"{DATASET}/models/v2",
            "splits": ["pool"],
            "min_count": 1,
            "predictions": names,
        }
        return await self("VerifyPredictions", pb.VerifyPredictionsRequest(**(pool | given)))


@pytest.fixture
def llm() -> Iterator[ScriptedLLM]:
    with ScriptedLLM() as server:
        yield server


@asynccontextmanager
async def serving(redis_url: str, store: Path, fails: bool = True, **settings: Any) -> AsyncIterator[Caller]:
    ranked_world(store, fails)
    given = {"listen": "127.0.0.1:0", "metrics_port": 0, "drain_s": 0.1}
    running = await start_server(Settings(redis_url=redis_url, store_url=store.as_uri(), **(given | settings)))
    try:
        async with grpc.aio.insecure_channel(running.address) as channel:
            yield Caller(channel)
    finally:
        await running.stop()


async def test_predicted_slices_tell_which_of_their_attributes_are_doubtful(redis_url, tmp_path):
    async with serving(redis_url, tmp_path) as call:
        name = (await call.create("tag_substitution")).name
        assert {tuple(s.doubtful) for s in await call.listed(name)} == {()}
        artifacts = Artifacts(Store(tmp_path.as_uri()), "default")
        artifacts.write_quality(TAGGING, {"attributes": [{"attribute": "place", "doubt": "so so"}]})
        slices = await call.listed(name)
        assert any(s.doubtful for s in slices)
        assert all(("place" in s.doubtful) == ("place" in {tag.attribute for tag in s.tags}) for s in slices)


async def test_every_method_predicts_what_is_not_enumerated_and_is_verified(redis_url, redis, tmp_path, llm):
    async with serving(redis_url, tmp_path, llm_base_url=llm.base_url, llm_model=MODEL) as call:
        names: dict[str, str] = {}
        for method, number in METHODS.items():
            job = await call.create(method)
            assert job.state == types_pb2.JOB_STATE_SUCCEEDED, job
            names[method] = job.name
            told = await call("GetPrediction", pb.GetPredictionRequest(name=job.name))
            slices = await call.listed(job.name)
            assert told.method == number
            assert told.predicted_slice_count == len(slices) > 0
            assert [s.rank for s in slices] == list(range(1, len(slices) + 1))
            for s in slices:
                assert (s.method, s.HasField("replaced")) == (number, method == "tag_substitution")
                assert s.HasField("expected_mean") == (method == "prior")
                assert 0 <= s.known_count < 5
            again = await call("CreatePrediction", pb.CreatePredictionRequest(parent=DATASET, ranking=str(RANKING)))
            assert again.job.name == names["tag_substitution"]
            if method == "instruction":
                assert {tag.attribute for s in slices for tag in s.tags} == {"main object", "fur color", "place"}
                assert all(len(s.tags) == 3 and s.target for s in slices)
                assert told.question_count == 2
                assert told.dropped
                assert told.provenance.model_snapshot == MODEL
                assert set(told.provenance.prompt_digests) == {"prediction/combinations", "prediction/targets"}
                # Who asked for it pays for it.
                spent = await Ledger(redis).spent(Account("default", job.name))
                assert (
                    spent.calls == job.cost.call_count == len(llm.calls) == 3
                )  # one for what the classes are taken for
        assert len(set(names.values())) == 3
        found = await call.verify(*names.values())
        assert [p.method for p in found.predictions] == list(METHODS.values())
        assert (found.scored_count, found.model, found.tagging) == (60, f"{DATASET}/models/v2", str(POOL_TAGGING))
        for p in found.predictions:
            assert len(p.slices) == p.predicted_slice_count
            counted = [s for s in p.slices if s.scored_count]
            assert p.verified.slice_count == len(counted)
            assert all(s.HasField("mean") == bool(s.scored_count) for s in p.slices)
            if counted:
                assert p.verified.mean_drop == pytest.approx(sum(s.drop for s in counted) / len(counted))
                assert p.base.slice_count > 0
        same = await call.verify(*names.values())
        assert same == found
        other = await call.create("prior", pair_count=2)
        assert {len(s.tags) for s in await call.listed(other.name)} == {2}


async def test_without_a_language_model_instruction_is_refused_at_once(redis_url, tmp_path):
    async with serving(redis_url, tmp_path) as call:
        with pytest.raises(Precondition, match=r"HIBUG2_LLM_BASE_URL.*tag_substitution or prior"):
            await call.create("instruction")


async def test_without_error_slices_substitution_fails_and_the_prior_does_not(redis_url, tmp_path):
    async with serving(redis_url, tmp_path, fails=False) as call:
        job = await call.create("tag_substitution")
        assert job.state == types_pb2.JOB_STATE_FAILED
        assert "no error slices to vary" in job.problem.message
        assert (await call.create("prior")).state == types_pb2.JOB_STATE_SUCCEEDED


async def test_the_setting_of_a_text_tower_is_taken_and_its_weights_tell_predictions_apart(redis_url, tmp_path):
    weights = tmp_path / "weights.pt"
    names = set()
    for content in (b"", b"one", b"two"):
        weights.write_bytes(content)
        clip = {"clip_model": "no-such-tower", "clip_weights": str(weights)} if content else {}
        async with serving(redis_url, tmp_path / "store", **clip) as call:
            job = await call.create("tag_substitution")
            names.add(job.name)
            if clip:  # it is asked for, and the embedded encoder does not stand in
                assert job.state == types_pb2.JOB_STATE_FAILED
                assert "no-such-tower" in job.problem.message or "hibug2-platform[clip]" in job.problem.message
    assert len(names) == 3
    async with serving(redis_url, tmp_path / "store", **clip | {"clip_weights": "gone/weights.pt"}) as call:
        with pytest.raises(Precondition, match=r"gone/weights.pt.*cannot be read"):
            await call.create("tag_substitution")


async def test_an_answer_of_no_use_fails_the_job_and_tells_its_cost(redis_url, tmp_path, llm):
    async with serving(redis_url, tmp_path, llm_base_url=llm.base_url, llm_model=MODEL) as call:
        llm.fail(*[Fault.REFUSAL] * 10)
        job = await call.create("instruction")
        assert job.state == types_pb2.JOB_STATE_FAILED
        assert job.problem.reason == "WRONG_ANSWER"
        assert job.cost.call_count == len(llm.calls) == 3
        with pytest.raises(NotFound):
            await call.listed(job.name)


async def test_what_cannot_be_asked_is_named(redis_url, tmp_path):
    async with serving(redis_url, tmp_path) as call:
        for given, error, text in (
            ({"ranking": f"{DATASET}/rankings/gone"}, NotFound, "rankings/gone"),
            ({"ranking": "datasets/other/rankings/r"}, InvalidInput, "ranking"),
            ({"method": 9}, InvalidInput, "9 is no method"),
            ({"max_per_class": 0}, InvalidInput, "max_per_class"),
            ({"pair_count": 4}, InvalidInput, "allow 2 to 3"),
            ({"pair_count": 1}, InvalidInput, "allow 2 to 3"),
            ({"method": METHODS["tag_substitution"], "pair_count": 2}, InvalidInput, "keeps the number of pairs"),
        ):
            with pytest.raises(error, match=text):
                await call.create("prior", **given)
        name = (await call.create("prior")).name
        for given, error, text in (
            ({"predictions": []}, InvalidInput, "predictions"),
            ({"predictions": [str(ENUMERATION)]}, InvalidInput, r"predictions\[0\]"),
            ({"tagging": "datasets/other/taggings/t"}, InvalidInput, "tagging"),
            ({"tagging": f"{DATASET}/taggings/gone"}, NotFound, "taggings/gone"),
            ({"model": f"{DATASET}/models/gone"}, NotFound, "gone"),
            ({"model": ""}, Precondition, "'v1' has no score for any of the 60 pool"),
            ({"splits": []}, InvalidInput, "no tagged instance is in 'test'"),
            ({"splits": ["validation"], "tagging": str(TAGGING)}, InvalidInput, "made from"),
            ({"min_count": 0}, InvalidInput, "min_count"),
            ({"seed": -1}, InvalidInput, "seed"),
        ):
            with pytest.raises(error, match=text):
                await call.verify(name, **given)


async def test_errors_are_those_of_the_platform(redis_url, tmp_path):
    async with serving(redis_url, tmp_path) as call:
        with pytest.raises(HiBug2Error):
            await call("CancelPrediction", pb.CancelPredictionRequest(name=f"{DATASET}/predictions/none"))
