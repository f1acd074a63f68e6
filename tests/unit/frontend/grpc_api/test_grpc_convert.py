"""Messages of `moesaic.v1` to our types and back, and errors as statuses. No server."""

from __future__ import annotations

import dataclasses

import pytest
from fakes import MEMORY, FakeAttentionWorker
from google.protobuf import json_format
from google.rpc import error_details_pb2
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo

from cluster import errors
from cluster.errors import ContextTooLong, InvalidRequest, Overloaded, Unavailable, codes_of
from cluster.frontend.generation.sequence import LogprobEntry, SamplingOptions, TextChunk, TokenText, Usage
from cluster.frontend.grpc_api.convert import (
    ChatPrompt,
    field_path,
    fill,
    parse_generation,
    stream_response,
    whole_response,
)
from cluster.frontend.grpc_api.errors import InvalidFields, status_of
from cluster.rpc import cluster_pb2
from cluster.rpc import generation_pb2 as pb
from cluster.status.expert_memory import CalibrationBin, ExpertMemoryStatus, TierStatus
from cluster.status.experts import ClusterActivations, ExpertsReport, LayerActivations, LayerExperts
from cluster.status.host import ExpertHostStatus
from cluster.status.worker import DataPlaneStatus, WorkerStatus
from cluster.types import FinishReason, Phase, StartupPhase, Tier

MAX_TRAILER_BYTES = 8192

# A value other than the default for every field of SamplingOptions: (as sent, as understood).
SAMPLING = {
    "max_tokens": (7, 7),
    "temperature": (0.7, 0.7),
    "top_p": (0.9, 0.9),
    "top_k": (5, 5),
    "min_p": (0.1, 0.1),
    "seed": (-3, -3),
    "min_tokens": (2, 2),
    "stop": (["a", "b"], ("a", "b")),
    "stop_token_ids": ([4, 5], (4, 5)),
    "ignore_eos": (True, True),
    "num_logprobs": (0, 0),
    "n": (3, 3),
    "presence_penalty": (0.5, 0.5),
    "frequency_penalty": (-0.5, -0.5),
    "repetition_penalty": (1.5, 1.5),
    "logit_bias": ({9: -100.0}, ((9, -100.0),)),
    "allowed_token_ids": ([1, 2], (1, 2)),
    "bad_words": (["no"], ("no",)),
    "num_prompt_logprobs": (4, 4),
    "logprob_token_ids": ([7, 8], (7, 8)),
    "include_stop_str_in_output": (True, True),
    "skip_special_tokens": (False, False),
    "truncate_prompt_tokens": (-1, -1),
    "truncation_side": ("right", "right"),
}
STATUS_PAIRS = [
    (WorkerStatus, cluster_pb2.WorkerStatus),
    (ExpertHostStatus, cluster_pb2.ExpertHostStatus),
    (ExpertMemoryStatus, cluster_pb2.ExpertMemoryStatus),
    (TierStatus, cluster_pb2.TierStatus),
    (CalibrationBin, cluster_pb2.CalibrationBin),
    (LayerExperts, cluster_pb2.LayerExperts),
    (DataPlaneStatus, cluster_pb2.DataPlaneStatus),
    (ClusterActivations, cluster_pb2.ClusterActivations),
    (LayerActivations, cluster_pb2.LayerActivations),
]
ERRORS = [getattr(errors, name) for name in dir(errors)]
ERRORS = [cls for cls in ERRORS if isinstance(cls, type) and issubclass(cls, errors.MoesaicError)]


def request(prompt=None, **sampling):
    return pb.GenerateRequest(prompt=prompt or pb.Prompt(text="x"), sampling=pb.SamplingOptions(**sampling))


def chat(*messages, **fields):
    return pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(**message) for message in messages], **fields))


def details_of(status):
    found = {}
    for detail in status.details:
        message = getattr(error_details_pb2, detail.TypeName().removeprefix("google.rpc."))()
        assert detail.Unpack(message)
        found[type(message)] = message
    return found


def test_every_sampling_option_has_a_field_and_arrives():
    assert {field.name for field in dataclasses.fields(SamplingOptions)} == set(SAMPLING)
    assert {field.name for field in pb.SamplingOptions.DESCRIPTOR.fields} == set(SAMPLING)
    for name, (sent, understood) in SAMPLING.items():
        options = parse_generation(request(**{name: sent})).options
        assert options == dataclasses.replace(SamplingOptions(), **{name: understood}), name


def test_what_is_left_out_has_its_default_and_zero_is_zero():
    assert parse_generation(pb.GenerateStreamRequest(prompt=pb.Prompt(text="x"))).options == SamplingOptions()
    assert parse_generation(request(temperature=0.0)).options.temperature == 0


def test_prompts_in_three_forms():
    assert parse_generation(request(pb.Prompt(text="hello"))).prompt == "hello"
    assert parse_generation(request(pb.Prompt(text=""))).prompt == ""
    assert parse_generation(request(pb.Prompt(token_ids=pb.TokenIds(ids=[1, 2])))).prompt == (1, 2)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
    parsed = call | {"function": {"name": "f", "arguments": {"x": [1]}}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "hi", "name": "Ann"},
        {"role": "assistant", "tool_calls": [call]},
    ]
    prompt = chat(*messages, add_generation_prompt=False, template_kwargs={"deep": True})
    assert parse_generation(request(prompt)).prompt == ChatPrompt(
        messages=(
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi", "name": "Ann"},
            {"role": "assistant", "content": "", "tool_calls": [parsed]},
        ),
        add_generation_prompt=False,
        continue_final_message=False,
        template_kwargs={"deep": True},
    )
    going_on = parse_generation(request(chat(*messages[:2], continue_final_message=True))).prompt
    assert isinstance(going_on, ChatPrompt)
    assert (going_on.continue_final_message, going_on.add_generation_prompt) == (True, False)


def test_all_wrong_fields_are_named_by_their_path():
    prompt = chat({"role": "user", "content": "x"}, {"role": "p" * 65, "content": "arr"})
    with pytest.raises(InvalidFields) as raised:
        parse_generation(request(prompt, temperature=3.0, min_p=21, top_k=-50))
    assert {violation.field for violation in raised.value.violations} == {
        "prompt.chat.messages[1].role",
        "sampling.temperature",
        "sampling.min_p",
        "sampling.top_k",
    }
    for violation in raised.value.violations:
        assert violation.description


@pytest.mark.parametrize(
    ("bad", "path"),
    [
        (pb.GenerateRequest(), "prompt"),
        (request(chat()), "prompt.chat.messages"),
        (request(temperature=float("nan")), "sampling.temperature"),
        (request(stop=["x"] * 17), "sampling.stop"),
        (request(truncate_prompt_tokens=0), "sampling.truncate_prompt_tokens"),
        (request(max_tokens=0), "sampling.max_tokens"),
        (request(num_logprobs=21), "sampling.num_logprobs"),
        (request(num_prompt_logprobs=50), "sampling.num_prompt_logprobs"),
        (request(logprob_token_ids=[5]), "sampling.logprob_token_ids"),
    ],
)
def test_wrong_requests(bad, path, make_service):
    with pytest.raises(InvalidRequest) as raised:
        make_service(FakeAttentionWorker()).prepare((5,), parse_generation(bad).options, "r")
    violation = details_of(status_of(raised.value, field_of=field_path))[BadRequest].field_violations[0]
    assert violation.field == path


def test_pieces_and_whole_answers():
    token = TokenText("a", b"a", -0.5, 7)
    entry = LogprobEntry(token, (token, TokenText("\ufffd", b"\xc3", -1.5, 8)))
    usage = Usage(prompt_tokens=5, completion_tokens=2, cached_tokens=4)
    first = TextChunk(text="a", token_ids=(7,), logprobs=(entry,), prompt_logprobs=(LogprobEntry(token, (), 3),))
    last = TextChunk(text="b", token_ids=(9,), finish_reason=FinishReason.STOP, usage=usage, stop_reason=9)

    piece = stream_response(1, first)
    assert (piece.index, piece.text, list(piece.token_ids), piece.finish_reason) == (1, "a", [7], 0)
    assert not piece.HasField("usage")
    assert piece.logprobs[0].top[1] == pb.TokenLogprob(text="\ufffd", raw=b"\xc3", logprob=-1.5, token_id=8)
    assert not piece.logprobs[0].HasField("rank")
    assert piece.prompt_logprobs[0].rank == 3
    assert stream_response(0, last).stop_token_id == 9

    whole = whole_response("m", [[first, last], [dataclasses.replace(last, stop_reason="END")]])
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.choices[0].text == "ab"
    assert list(whole.choices[0].token_ids) == [7, 9]
    assert whole.choices[0].finish_reason == pb.FINISH_REASON_STOP
    assert whole.choices[1].stop == "END"
    assert whole.usage == pb.Usage(prompt_tokens=5, completion_tokens=4, cached_tokens=4), "the prompt counts once"


@pytest.mark.parametrize("reason", list(FinishReason))
def test_every_finish_reason_has_a_value(reason):
    usage = Usage(prompt_tokens=1, completion_tokens=0, cached_tokens=0)
    chunk = TextChunk(text="", token_ids=(), finish_reason=reason, usage=usage)
    assert pb.FinishReason.Name(stream_response(0, chunk).finish_reason) == f"FINISH_REASON_{reason.name}"


@pytest.mark.parametrize(("ours", "message"), STATUS_PAIRS)
def test_every_field_of_a_status_has_one_in_its_message(ours, message):
    assert {field.name for field in dataclasses.fields(ours)} == set(message.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize("phase", list(StartupPhase))
def test_a_status_is_copied_whole(phase):
    host = ExpertHostStatus(
        host_id="h0",
        phase=phase,
        error=None,
        **dict.fromkeys(("epoch", "owned", "num_connections", "num_frames", "num_rows"), 3),
        num_batches=2**40,
        num_refused=0,
        busy_s=1.5,
        expert_memory=None,
        degraded=("slow disk",),
    )
    message = cluster_pb2.ExpertHostStatus()
    fill(message, host)
    assert cluster_pb2.StartupPhase.Name(message.phase) == f"STARTUP_PHASE_{phase.name}"
    assert (message.host_id, message.num_batches, message.busy_s) == ("h0", 2**40, 1.5)
    assert list(message.degraded) == ["slow disk"]
    assert not message.HasField("error")
    assert not message.HasField("expert_memory")


def test_experts_are_copied_by_layer():
    counts = {Phase.PREFILL: (5, 0, 6), Phase.DECODE: ()}
    layer = LayerExperts(
        layer=1,
        num_experts=3,
        resident=(0, 2),
        activations=counts,
        hits=3,
        misses=1,
        ram_resident=(1,),
        misses_by_tier={Tier.RAM: 1, Tier.DISK: 0},
        late=1,
        stall_s=0.5,
    )
    message = cluster_pb2.ExpertsReport()
    fill(message, ExpertsReport(owner_id="w0", layers=(layer,)))
    assert json_format.MessageToDict(message, preserving_proto_field_name=True) == {
        "owner_id": "w0",
        "layers": [
            {
                "layer": 1,
                "num_experts": 3,
                "resident": [0, 2],
                "activations": {"prefill": ["5", "0", "6"]},
                "hits": "3",
                "misses": "1",
                "ram_resident": [1],
                "misses_by_tier": {"ram": "1"},
                "late": "1",
                "stall_s": 0.5,
            }
        ],
    }


def test_expert_memory_is_copied_with_its_tiers_and_its_calibration():
    message = cluster_pb2.ExpertMemoryStatus()
    fill(message, MEMORY)
    assert [(tier.tier, tier.HasField("budget_bytes"), tier.bytes_moved) for tier in message.tiers] == [
        (cluster_pb2.TIER_DEVICE, True, 0),
        (cluster_pb2.TIER_RAM, True, 25),
        (cluster_pb2.TIER_DISK, False, 5),
    ]
    assert message.tiers[1].emulated
    assert (message.misses_by_tier.ram, message.misses_by_tier.disk) == (3, 2)
    assert message.prefetch_bytes.disk == 12
    assert [(b.predicted, b.observed, b.count) for b in message.calibration] == [(0.125, 0.25, 16), (0.75, 0.5, 4)]
    assert (message.eviction, message.prediction, message.search_share) == ("moesaic", "fmoe", 0.25)


@pytest.mark.parametrize(
    ("param", "path"),
    [
        ("model", "model"),
        ("prompt.text", "prompt.text"),
        ("max_tokens", "sampling.max_tokens"),
        ("prompt_logprobs", "sampling.num_prompt_logprobs"),
        ("messages", "prompt.chat.messages"),
        ("chat_template_kwargs", "prompt.chat.template_kwargs"),
    ],
)
def test_what_our_errors_name_is_found_in_the_message(param, path):
    assert field_path(param) == path
    message = pb.GenerateRequest.DESCRIPTOR
    for name in path.split("."):
        message = message.fields_by_name[name].message_type  # a KeyError if there is none


def test_every_tier_has_its_value_and_its_counts():
    assert {f"TIER_{tier.name}" for tier in Tier} < set(cluster_pb2.Tier.keys())
    assert set(Tier) - {Tier.DEVICE} == set(cluster_pb2.TierCounts.DESCRIPTOR.fields_by_name)


def test_every_phase_has_its_counts():
    assert set(Phase) == set(cluster_pb2.ActivationCounts.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize("cls", ERRORS)
def test_every_error_has_code_and_reason(cls):
    status = status_of(cls("what, how much, way out", code="some_code"))
    info = details_of(status)[ErrorInfo]
    assert status.message == "what, how much, way out"
    assert (info.domain, info.metadata["code"]) == ("moesaic", "some_code")
    assert info.reason.replace("_", "") == cls.__name__.upper()
    assert (RetryInfo in details_of(status)) == codes_of(cls("")).retryable


def test_retry_and_field_are_told():
    assert details_of(status_of(Overloaded("full")))[RetryInfo].retry_delay.ToMilliseconds() == 1000
    assert details_of(status_of(Unavailable("away")))[RetryInfo].retry_delay.ToMilliseconds() == 2000
    status = status_of(ContextTooLong("too long", param="max_tokens"), field_of=field_path)
    assert details_of(status)[BadRequest].field_violations[0].field == "sampling.max_tokens"
    assert details_of(status)[ErrorInfo].reason == "CONTEXT_TOO_LONG"


def test_a_bug_is_not_explained_to_clients():
    status = status_of(KeyError("secret"))
    assert "secret" not in str(status)
    assert details_of(status)[ErrorInfo].reason == "INTERNAL_ERROR"


def test_the_longest_error_fits_into_a_trailer():
    prompt = chat(*({"role": "é" * 5000, "content": "x"} for _ in range(50)))
    with pytest.raises(InvalidFields) as raised:
        parse_generation(request(prompt, temperature=9.0))
    status = status_of(raised.value)
    percent_encoded = sum(3 if byte >= 127 else 1 for byte in status.message.encode())
    in_base64 = -(-len(status.SerializeToString()) // 3) * 4
    assert percent_encoded + in_base64 < MAX_TRAILER_BYTES - 512  # room for what else is in it
    assert "messages[0].role" in status.message
