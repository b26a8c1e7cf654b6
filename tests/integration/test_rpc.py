from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from redis.exceptions import ConnectionError as RedisConnectionError

import hibug2
from hibug2 import Client
from hibug2.v1 import repair_pb2 as pb
from hibug2.v1 import repair_pb2_grpc as rpc
from services.gateway.proxy import add_proxy
from shared import errors
from shared.config import ServiceSettings
from shared.errors import Violation
from shared.metrics import RPCS, RPCS_IN_FLIGHT
from shared.rpc import context, status
from shared.rpc.channel import connect
from shared.rpc.probe import healthy
from shared.rpc.server import RunningServer, start
from tests.integration.waiting import eventually

SERVICE = pb.DESCRIPTOR.services_by_name["RepairService"]
GET = f"/{SERVICE.full_name}/GetSelection"


class Servicer(rpc.RepairServiceServicer):
    """Answers by what a test puts in."""

    def __init__(self) -> None:
        self.calls = 0
        self.seen: list[tuple[str, str, float | None]] = []
        self.cancelled = asyncio.Event()
        self.get: Callable[[], Awaitable[None]] = self._nothing
        self.watch: Callable[[], AsyncIterator[None]] = self._for_ever

    async def _nothing(self) -> None: ...

    async def _for_ever(self) -> AsyncIterator[None]:
        try:
            while True:
                yield
                await asyncio.sleep(0.01)
        finally:
            self.cancelled.set()

    async def GetSelection(self, request, grpc_context):  # noqa: N802
        self.calls += 1
        self.seen.append((context.team.get(), context.request_id.get(), context.time_left(None)))
        await self.get()
        return pb.GetSelectionResponse(pick_count=self.calls)

    async def WatchSelection(self, request, grpc_context):  # noqa: N802
        self.seen.append((context.team.get(), context.request_id.get(), context.time_left(None)))
        async for _ in self.watch():
            yield pb.WatchSelectionResponse()


class Two:
    """A service, and a gateway that passes calls on to it."""

    def __init__(self, servicer: Servicer, service: RunningServer, gateway: RunningServer, exits: AsyncExitStack):
        self.servicer, self.service, self.gateway, self._exits = servicer, service, gateway, exits

    async def stub(self, address: str = "", *, plain: bool = False) -> rpc.RepairServiceStub:
        """A stub for the gateway; `plain` without what the platform's own channels add."""
        address = address or self.gateway.address
        channel = grpc.aio.insecure_channel(address) if plain else connect(address)
        return rpc.RepairServiceStub(await self._exits.enter_async_context(channel))


def settings(**more) -> ServiceSettings:
    return ServiceSettings(listen="127.0.0.1:0", metrics_port=0, drain_s=0.2, **more)


@pytest.fixture
async def two():
    async with AsyncExitStack() as exits:
        servicer = Servicer()

        def add(server):
            rpc.add_RepairServiceServicer_to_server(servicer, server)
            return [SERVICE.full_name]

        service = await start(settings(reflection=True), add)
        exits.push_async_callback(service.stop)
        channel = await exits.enter_async_context(connect(service.address, retries=False))  # as the gateway's
        gateway = await start(settings(), lambda server: [add_proxy(server, SERVICE, channel)])
        exits.push_async_callback(gateway.stop)
        token = context.team.set("default"), context.request_id.set("")
        yield Two(servicer, service, gateway, exits)
        context.team.reset(token[0])
        context.request_id.reset(token[1])


def raising(error: BaseException):
    async def fail() -> None:
        raise error

    return fail


async def refused(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    return failure.value


VIOLATIONS = (Violation("instances[3].label", "é is wrong"), Violation("b", "too"))
ALL = [
    errors.InvalidInput("nö: wrong", {"key": "välue"}, VIOLATIONS),
    errors.InvalidInput("wrong", {}, ()),
    errors.NotFound("no dataset", {"dataset": "d"}),
    errors.AlreadyExists("there"),
    errors.Precondition("first do that"),
    errors.PermissionDenied("not yours"),
    errors.TooLarge("too large", {"estimate": "9", "limit": "3"}),
    errors.Busy("too much waits", {"waiting": "9"}, 12.5),
    errors.DataLoss("broken"),
    errors.HiBug2Error("odd", {"a": "b"}),
]


@pytest.mark.parametrize("error", ALL, ids=lambda error: type(error).__name__)
async def test_an_error_reaches_the_caller_over_two_hops_as_it_was_raised(two, error):
    two.servicer.get = raising(error)
    failure = await refused((await two.stub()).GetSelection(pb.GetSelectionRequest()))
    again = status.error_of(failure)
    assert type(again) is type(error)
    assert again == error
    assert failure.details() == error.message


async def test_an_error_in_a_stream_reaches_the_caller_after_what_came_before(two):
    async def watch():
        yield
        raise ALL[0]

    two.servicer.watch = watch
    answers = (await two.stub()).WatchSelection(pb.WatchSelectionRequest())
    assert await answers.read() == pb.WatchSelectionResponse()
    assert status.error_of(await refused(answers.read())) == ALL[0]


async def test_an_error_with_very_much_to_say_still_reaches_the_caller(two):
    many = tuple(Violation(f"instances[{i}].label", "unknown, " * 200) for i in range(100))
    two.servicer.get = raising(errors.InvalidInput("ö" * 10_000, {"k": "v" * 9000}, many))
    again = status.error_of(await refused((await two.stub()).GetSelection(pb.GetSelectionRequest())))
    assert isinstance(again, errors.InvalidInput)
    assert again.violations[0].field == "instances[0].label"
    assert again.message.startswith("ööö")


async def test_an_unexpected_exception_tells_the_request_id_and_no_internals(two):
    two.servicer.get = raising(KeyError("the secret"))
    failure = await refused(
        (await two.stub()).GetSelection(pb.GetSelectionRequest(), metadata=[(context.REQUEST_KEY, "my-request")])
    )
    assert failure.code() is grpc.StatusCode.INTERNAL
    assert "my-request" in failure.details()
    assert "secret" not in str(failure)
    assert "KeyError" not in str(failure)


async def test_redis_that_is_away_is_unavailable(two):
    two.servicer.get = raising(RedisConnectionError("Error 111 connecting to internal-host:6379"))
    failure = await refused((await two.stub(plain=True)).GetSelection(pb.GetSelectionRequest()))
    assert failure.code() is grpc.StatusCode.UNAVAILABLE
    assert "internal-host" not in failure.details()


async def test_team_and_request_id_travel_over_both_hops(two):
    stub = await two.stub()
    metadata = [(context.TEAM_KEY, "team-a"), (context.REQUEST_KEY, "r1")]
    await stub.GetSelection(pb.GetSelectionRequest(), metadata=metadata)
    watching = stub.WatchSelection(pb.WatchSelectionRequest(), metadata=metadata)
    await anext(aiter(watching))
    watching.cancel()
    assert [seen[:2] for seen in two.servicer.seen] == [("team-a", "r1")] * 2


async def test_a_call_made_for_a_caller_carries_the_callers_team_and_request(two):
    context.team.set("team-b")
    context.request_id.set("r2")
    await (await two.stub()).GetSelection(pb.GetSelectionRequest())
    assert two.servicer.seen[0][:2] == ("team-b", "r2")


async def test_a_call_that_names_none_is_the_default_teams_and_gets_an_id(two):
    await (await two.stub(plain=True)).GetSelection(pb.GetSelectionRequest())
    team, request, _ = two.servicer.seen[0]
    assert team == "default"
    assert len(request) == 32


async def test_what_is_no_team_is_refused_at_the_door(two):
    failure = await refused(
        (await two.stub()).GetSelection(pb.GetSelectionRequest(), metadata=[(context.TEAM_KEY, "../other")])
    )
    assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert two.servicer.calls == 0


async def test_the_callers_deadline_is_passed_on(two):
    stub = await two.stub(plain=True)
    await stub.GetSelection(pb.GetSelectionRequest(), timeout=7)
    await stub.GetSelection(pb.GetSelectionRequest())
    async for _ in stub.WatchSelection(pb.WatchSelectionRequest(), timeout=9):
        break
    with_deadline, without, stream = (left for _, _, left in two.servicer.seen)
    # gRPC rounds up what is left
    assert 5 < with_deadline < 7.5
    assert 50 < without < 61  # the gateway's own limit
    assert 7 < stream < 9.5


async def test_a_call_past_its_deadline_is_ended_on_both_hops(two):
    ended = asyncio.Event()

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    two.servicer.get = slow
    failure = await refused((await two.stub()).GetSelection(pb.GetSelectionRequest(), timeout=0.3))
    assert failure.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert isinstance(status.error_of(failure), errors.Unavailable)
    await asyncio.wait_for(ended.wait(), 5)


async def test_a_stream_that_the_caller_leaves_ends_on_both_hops(two):
    watching = (await two.stub()).WatchSelection(pb.WatchSelectionRequest())
    await anext(aiter(watching))
    watching.cancel()
    await asyncio.wait_for(two.servicer.cancelled.wait(), 5)


async def test_a_service_that_is_away_for_a_moment_is_asked_again(two):
    async def third_time() -> None:
        if two.servicer.calls < 3:
            raise errors.Unavailable("not yet")

    two.servicer.get = third_time
    answer = await (await two.stub(two.service.address)).GetSelection(pb.GetSelectionRequest())
    assert answer.pick_count == 3


async def test_other_errors_are_not_asked_again(two):
    two.servicer.get = raising(errors.Precondition("no"))
    await refused((await two.stub(two.service.address)).GetSelection(pb.GetSelectionRequest()))
    assert two.servicer.calls == 1


async def test_a_service_that_stays_away_is_unavailable(two):
    await two.service.stop()
    failure = await refused((await two.stub(plain=True)).GetSelection(pb.GetSelectionRequest(), timeout=20))
    assert failure.code() is grpc.StatusCode.UNAVAILABLE


async def test_health_tells_of_each_service_until_the_server_drains(two):
    async with grpc.aio.insecure_channel(two.service.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE.full_name):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        failure = await refused(stub.Check(health_pb2.HealthCheckRequest(service="other")))
        assert failure.code() is grpc.StatusCode.NOT_FOUND
        watching = stub.Watch(health_pb2.HealthCheckRequest())
        changes = [(await watching.read()).status]
        stopping = asyncio.create_task(two.service.stop())
        changes.append((await watching.read()).status)
        assert changes == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]
        await stopping
    assert not await asyncio.to_thread(healthy, two.service.address, 0.5)


async def test_the_probe_sees_a_healthy_server(two):
    assert await asyncio.to_thread(healthy, two.service.address)


async def listed(address: str) -> set[str]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        answers = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        async for answer in answers:
            return {service.name for service in answer.list_services_response.service}
    return set()


async def test_reflection_is_there_only_when_it_is_switched_on(two):
    assert SERVICE.full_name in await listed(two.service.address)
    failure = await refused(listed(two.gateway.address))
    assert failure.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_one_layer_tries_again_while_a_service_is_in_trouble(two):
    """The caller: a gateway that did so as well would make 25 calls of five."""
    two.servicer.get = raising(errors.Unavailable("in trouble"))
    with Client(two.gateway.address) as client, pytest.raises(hibug2.HiBug2Error, match="in trouble"):
        await asyncio.to_thread(client._call, client._repair.GetSelection, pb.GetSelectionRequest())
    assert two.servicer.calls == 5


async def test_calls_are_counted_by_method_and_code(two):
    def count(code: str) -> float:
        return RPCS.labels(GET, code)._value.get()

    before = {code: count(code) for code in ("OK", "NOT_FOUND", "INTERNAL")}
    stub = await two.stub(two.service.address)
    await stub.GetSelection(pb.GetSelectionRequest())
    for error in (errors.NotFound("no"), KeyError("x")):
        two.servicer.get = raising(error)
        await refused(stub.GetSelection(pb.GetSelectionRequest()))
    expected = {code: number + 1 for code, number in before.items()}
    await eventually(lambda: {code: count(code) for code in before} == expected)


async def test_calls_in_flight_are_counted_until_they_end_however_they_end(two):
    def in_flight(method: str) -> float:
        return RPCS_IN_FLIGHT.labels(f"/{SERVICE.full_name}/{method}")._value.get()

    entered, release = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        entered.set()
        await release.wait()
        raise errors.NotFound("no")

    two.servicer.get = hold
    stub = await two.stub(two.service.address)
    call = stub.GetSelection(pb.GetSelectionRequest())
    await entered.wait()
    watching = stub.WatchSelection(pb.WatchSelectionRequest())
    await anext(aiter(watching))
    assert (in_flight("GetSelection"), in_flight("WatchSelection")) == (1, 1)
    watching.cancel()
    release.set()
    await refused(call)
    await eventually(lambda: (in_flight("GetSelection"), in_flight("WatchSelection")) == (0, 0))


async def test_an_address_that_is_taken_is_told_with_its_setting(two):
    taken = ServiceSettings(listen=two.service.address, metrics_port=0)
    with pytest.raises(OSError, match="HIBUG2_LISTEN"):
        await start(taken, lambda server: [])


async def test_stopping_lets_a_running_call_end_and_then_closes_what_it_stood_on():
    servicer, order = Servicer(), []
    release, entered = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        entered.set()
        await release.wait()
        order.append("call")

    async def close() -> None:
        order.append("closed")

    def add(server):
        rpc.add_RepairServiceServicer_to_server(servicer, server)
        return [SERVICE.full_name]

    servicer.get = hold
    running = await start(ServiceSettings(listen="127.0.0.1:0", metrics_port=0, drain_s=30), add, closers=[close])
    async with connect(running.address) as channel:
        call = rpc.RepairServiceStub(channel).GetSelection(pb.GetSelectionRequest())
        await asyncio.wait_for(entered.wait(), 5)
        stopping = asyncio.create_task(running.stop())
        async with grpc.aio.insecure_channel(running.address) as other:
            late = rpc.RepairServiceStub(other).GetSelection(pb.GetSelectionRequest(), timeout=5)
            assert (await refused(late)).code() is grpc.StatusCode.UNAVAILABLE
        release.set()
        assert (await call).pick_count == 1
        await stopping
    assert order == ["call", "closed"]
