"""The services of `moesaic.v1`: messages in, `GenerationService` or the workers behind it, messages out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from functools import partial
from typing import TypeVar

from cluster.errors import InvalidRequest, ModelNotFound, Unavailable
from cluster.frontend.generation.sequence import TextChunk
from cluster.frontend.generation.service import GenerationService
from cluster.frontend.grpc_api.calls import REQUEST_ID_KEY, Call, Calls, Context
from cluster.frontend.grpc_api.convert import (
    ChatPrompt,
    Generation,
    fill,
    parse_generation,
    stream_response,
    whole_response,
)
from cluster.frontend.http.open_requests import OpenRequests
from cluster.frontend.http.operator_routes import cluster_activations
from cluster.frontend.http.snapshots import Snapshots
from cluster.model.info import ModelInfo
from cluster.protocols import AttentionWorkerClient
from cluster.rpc import cluster_pb2, generation_pb2
from cluster.rpc.cluster_pb2_grpc import ClusterServiceServicer
from cluster.rpc.generation_pb2_grpc import GenerationServiceServicer

_WORKER_TIMEOUT_S = 5.0

Answer = TypeVar("Answer")


class GenerationServicer(GenerationServiceServicer):
    """`moesaic.v1.GenerationService`.

    Both methods are coroutines that hold their sequences open themselves, so that a call that is cancelled closes
    them before anything else happens.
    """

    def __init__(
        self, service: GenerationService, info: ModelInfo, calls: Calls, *, refuses_unknown: bool = False
    ) -> None:
        self._service = service
        self._refuses_unknown = refuses_unknown
        self._info = info
        self._calls = calls

    async def Generate(  # noqa: N802 - the name is the protocol's
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> generation_pb2.GenerateResponse:
        """The whole answer at once."""

        async def work(call: Call) -> generation_pb2.GenerateResponse:
            choices: dict[int, list[TextChunk]] = {}
            async with aclosing(self._chunks(request, call)) as chunks:
                async for index, chunk in chunks:
                    choices.setdefault(index, []).append(chunk)
            return whole_response(self._info.name, [choices[index] for index in sorted(choices)])

        return await self._calls.generate(context, "Generate", work)

    async def GenerateStream(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride] - writes instead
        self, request: generation_pb2.GenerateStreamRequest, context: Context
    ) -> None:
        """The answer piece by piece."""

        async def work(call: Call) -> None:
            is_named = False
            async with aclosing(self._chunks(request, call)) as chunks:
                async for index, chunk in chunks:
                    if not is_named:  # not before: a call that has sent something is not retried by clients
                        await context.send_initial_metadata(((REQUEST_ID_KEY, call.request_id),))
                        is_named = True
                    await context.write(stream_response(index, chunk))

        await self._calls.generate(context, "GenerateStream", work)

    async def _chunks(self, request: Generation, call: Call) -> AsyncGenerator[tuple[int, TextChunk]]:
        """Check the request, then run its sequences; while they run, they can be aborted by the call's names."""
        if request.model not in ("", self._info.name):
            message = f"the model {request.model[:200]!r} does not exist; this server has {self._info.name!r}"
            raise ModelNotFound(message, param="model", code="model_not_found")
        parsed = await self._service.inputs.run(partial(parse_generation, request), num_bytes=request.ByteSize())
        call.ignored_fields.extend(parsed.ignored_fields)
        if self._refuses_unknown and parsed.ignored_fields:
            names = ", ".join(parsed.ignored_fields)
            raise InvalidRequest(f"unknown fields, by number: {names}", param=parsed.ignored_fields[0])
        prompt = parsed.prompt
        if isinstance(prompt, ChatPrompt):
            prompt_ids = await self._service.encode_chat(
                prompt.messages,
                add_generation_prompt=prompt.add_generation_prompt,
                continue_final_message=prompt.continue_final_message,
                kwargs=prompt.template_kwargs,
            )
        else:
            prompt_ids = await self._service.encode_text(prompt) if isinstance(prompt, str) else prompt
        sequences = await self._service.prepare_choices(
            prompt_ids, parsed.options, call.answer_id, prompt_param=f"prompt.{request.prompt.WhichOneof('content')}"
        )
        ids = [sequence.request_id for sequence in sequences]
        with self._service.answers.listed((call.answer_id, call.request_id), ids):
            async with aclosing(self._service.stream_choices(sequences, timeout_s=call.timeout_s)) as chunks:
                async for chunk in chunks:
                    yield chunk


class ClusterServicer(ClusterServiceServicer):
    """`moesaic.v1.ClusterService`."""

    def __init__(
        self, worker: AttentionWorkerClient, requests: OpenRequests, calls: Calls, *, max_age_s: float = 0.0
    ) -> None:
        """Args: max_age_s: of what workers said; who asks within it is told the same."""
        self._snapshots = Snapshots(max_age_s, timeout_s=_WORKER_TIMEOUT_S)
        self._worker = worker
        self._requests = requests
        self._calls = calls

    async def GetStatus(  # noqa: N802
        self, request: cluster_pb2.GetStatusRequest, context: Context
    ) -> cluster_pb2.GetStatusResponse:
        """What workers and hosts say of themselves."""

        async def work(_call: Call) -> cluster_pb2.GetStatusResponse:
            response = cluster_pb2.GetStatusResponse(
                draining=self._requests.draining, num_in_flight=self._requests.num_in_flight
            )
            for worker in await _answer(self._snapshots.get("workers", self._worker.worker_statuses)):
                fill(response.workers.add(), worker)
            for host in await _answer(self._snapshots.get("hosts", self._worker.host_statuses)):
                fill(response.hosts.add(), host)
            return response

        return await self._calls.answer(context, "GetStatus", work)

    async def GetExperts(  # noqa: N802
        self, request: cluster_pb2.GetExpertsRequest, context: Context
    ) -> cluster_pb2.GetExpertsResponse:
        """Residency and activation by layer."""

        async def work(_call: Call) -> cluster_pb2.GetExpertsResponse:
            response = cluster_pb2.GetExpertsResponse()
            reports = await _answer(self._snapshots.get("experts", self._worker.experts_reports))
            for report in reports:
                fill(response.reports.add(), report)
            if (activations := cluster_activations(reports)) is not None:
                fill(response.cluster, activations)
            return response

        return await self._calls.answer(context, "GetExperts", work)


async def _answer(call: Awaitable[Answer]) -> Answer:
    try:
        async with asyncio.timeout(_WORKER_TIMEOUT_S):
            return await call
    except (ConnectionError, TimeoutError) as error:
        raise Unavailable(f"the attention worker does not answer ({type(error).__name__})") from error
