"""What a failure costs: three nodes under steady load, and one thing after the other killed, drained, cut off, healed.

deploy/three_nodes.py makes the cluster (root, iproute2). Greedy float32 streams go through the HTTP and gRPC front ends
of all nodes; every token is compared with those of transformers. A stream may fail only if its own front end or that
one's node was hit. Times: longest time without a token in a stream of another front end; longest time to the answer of
a client that comes anew and knocks at one door after the other; time until workers, hosts and front ends are all there
again, with what an operator starts again.

    python -m benchmarks drill [--quick] [--json] [--only FAULT]
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.faults.load import Case, Door, DoorWatch, SteadyLoad
from benchmarks.shared.command_line import progress
from benchmarks.shared.measuring import one_thread
from benchmarks.shared.models import DEMO, REPOSITORY
from benchmarks.shared.prompts import prompts_of_domains
from benchmarks.shared.report import Report

sys.path.insert(0, str(REPOSITORY / "deploy"))

import local_cluster
from three_nodes import NUM_NODES, ThreeNodes, three_nodes

DETECTION_S = 2.0  # DESIGN 10: no progress for max(2 s, 20 steps)
MAX_STALL_S = DETECTION_S + 10.0
MAX_DOOR_S = 5.0

_PROMPT_TOKENS = 24
_NEAR_TIE = 1e-4
_BEFORE_S = 15.0
_CUT_S = 20.0  # longer than Ray takes to give a node up, 15 s
_RECOVERY_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong: `strike` does it and says which doors are hit, `mend` is what an operator does."""

    name: str
    strike: Callable[[ThreeNodes], Awaitable[set[Door]]]
    mend: Callable[[ThreeNodes], Awaitable[None]] | None = None


def add_options(parser: ArgumentParser) -> None:
    """Besides those of every benchmark."""
    parser.add_argument("--only", help="the faults whose names contain this")
    parser.add_argument("--concurrency", type=int, default=6)
    parser.add_argument("--state", type=Path, help="use the running cluster of deploy/three_nodes.py --state")


def run(options: Namespace) -> Report:
    """Measure."""
    _before_nodes()
    report = Report(f"Drill: three nodes, moesaic-demo, float32, {options.concurrency} streams")
    with one_thread():
        cases = reference_cases(4 if options.quick else 12, 64 if options.quick else 128)
    faults = [fault for fault in FAULTS if options.only is None or options.only in fault.name]
    with tempfile.TemporaryDirectory(prefix="drill") as root, _cluster(options.state, Path(root)) as nodes:
        progress(f"ready; log: {nodes.log}")
        asyncio.run(_drill(nodes, faults, cases, options.concurrency, report))
    return report


def _before_nodes() -> None:
    """In truth clients have machines of their own: here they come before the nodes, which share the processors."""
    with contextlib.suppress(OSError):  # a kernel without groups
        Path("/proc/self/autogroup").write_text("-10")


def _cluster(running: Path | None, root: Path) -> AbstractContextManager[ThreeNodes]:
    if running is None:
        return three_nodes(root)
    return nullcontext(ThreeNodes(local_cluster.Cluster.load(running.resolve())))


async def _drill(nodes: ThreeNodes, faults: list[Fault], cases: list[Case], concurrency: int, report: Report) -> None:
    doors = [Door(node, "http", nodes.url(node)) for node in range(1, NUM_NODES + 1)]
    doors += [Door(node, "grpc", nodes.grpc_address(node)) for node in range(1, NUM_NODES + 1)]
    load = SteadyLoad(DEMO.name, doors, cases, concurrency=concurrency)
    watch = DoorWatch(DEMO.name, doors, cases[0])
    try:
        usual = await asyncio.to_thread(nodes.problems)
        first_epoch = await asyncio.to_thread(_epoch, nodes)
        await _until(lambda: len([s for s in load.streams if s.ended_s is not None]) >= 2 * concurrency, 120)
        for fault in faults:
            await _run_fault(nodes, fault, load, watch, report, usual)
    finally:
        await watch.stop()
        await load.stop()
    report.notes.append(f"placement epoch {first_epoch} before, {_epoch(nodes)} after")
    failed = [stream for stream in load.streams if stream.error is not None]
    report.notes.append(f"{len(load.streams)} streams, {len(failed)} failed, {load.num_refused} knocks at closed doors")
    report.notes.extend(sorted({f"{s.door.protocol} of node {s.door.node}: {s.error}"[:200] for s in failed}))


async def _run_fault(
    nodes: ThreeNodes, fault: Fault, load: SteadyLoad, watch: DoorWatch, report: Report, usual: set[str]
) -> None:
    """Strike, wait until workers and hosts are there again, mend, judge every stream that was under way meanwhile."""
    await _until(lambda: len(load.under_way()) >= 3, 30)
    under_way, struck_s = load.under_way(), time.monotonic()
    door_before_s = watch.longest_s(struck_s - _BEFORE_S, struck_s)
    progress(f"{fault.name}: {len(under_way)} streams under way")
    hit = await fault.strike(nodes)
    of_hit = {f"no {door.protocol.upper().replace('GRPC', 'gRPC')} at node {door.node}" for door in hit}
    back_s = await _until_whole(nodes, struck_s, usual | of_hit)
    if fault.mend is not None:
        try:
            await fault.mend(nodes)
        except SystemExit as error:  # a raylet that does not start on a busy machine: the row says that it is not whole
            progress(f"  {error}")
    whole_s = await _until_whole(nodes, struck_s, usual)
    streams = list(load.streams)
    await _until(lambda: all(s.ended_s is not None for s in streams), 150)
    await asyncio.sleep(2.0)
    concerned = [s for s in streams if s.ended_s is None or s.ended_s >= struck_s]
    excused = [s for s in concerned if s.error is not None and s.door in hit]
    failed = [s for s in concerned if (s.error is not None or s.ended_s is None) and s.door not in hit]
    wrong = [s for s in concerned if s.wrong_at is not None]
    stall_s = max((s.longest_stall_s(struck_s) for s in concerned if s.door not in hit), default=0.0)
    door_s = watch.longest_s(struck_s)
    slow = sorted((v for v in watch.served if v.came_s >= struck_s), key=lambda v: v.took_s, reverse=True)
    for visit in slow[:4]:
        tries = ", ".join(visit.tries)
        progress(f"  new client at {visit.came_s - struck_s:.0f} s: {visit.took_s:.1f} s ({tries})")
    for stream in (*failed, *wrong):
        progress(f"  {stream.door}: {stream.error}, wrong at {stream.wrong_at}")
    report.rows.append(
        {
            "fault": fault.name,
            "under way": len(under_way),
            "concerned": len(concerned),
            "failed": len(failed),
            "of dead front ends": len(excused),
            "wrong tokens": len(wrong),
            "longest stall s": stall_s,
            "new client served s": door_s,
            "before the fault s": door_before_s,
            "workers and hosts back s": back_s,
            "whole again s": whole_s,
        }
    )
    progress(f"  {report.rows[-1]}")
    report.at_most(f"{fault.name}: failed streams whose front end lived", len(failed), 0)
    report.at_most(f"{fault.name}: streams with a wrong token", len(wrong), 0)
    report.at_most(f"{fault.name}: longest stall, s", stall_s, MAX_STALL_S)
    report.at_most(f"{fault.name}: new client served, s", door_s, MAX_DOOR_S)
    report.at_most(f"{fault.name}: whole again, s", whole_s, _RECOVERY_TIMEOUT_S)


async def _until_whole(nodes: ThreeNodes, struck_s: float, usual: set[str]) -> float:
    """Seconds from the strike until all is there again; infinite when that takes too long.

    Args: usual: what was not perfect before, such as reads that are not direct.
    """
    end_s = time.monotonic() + _RECOVERY_TIMEOUT_S
    await asyncio.sleep(1.0)  # what was killed is still in somebody's list
    while problems := (await asyncio.to_thread(nodes.problems)) - usual:
        if time.monotonic() > end_s:
            progress(f"  not whole: {sorted(problems)}")
            return float("inf")
        await asyncio.sleep(0.5)
    return time.monotonic() - struck_s


async def _until(is_true: Callable[[], bool], timeout_s: float) -> None:
    """Poll: what is waited for has no event of its own."""
    end_s = time.monotonic() + timeout_s
    while not is_true() and time.monotonic() < end_s:  # noqa: ASYNC110
        await asyncio.sleep(0.1)


def _kill_process(*titles: str) -> Callable[[ThreeNodes], Awaitable[set[Door]]]:
    """Kill -9 the first process, of the last node that has one, whose title has all `titles`."""

    async def strike(nodes: ThreeNodes) -> set[Door]:
        node, pid, title = _find(nodes, *titles)
        progress(f"  kill -9 {pid} on node {node}: {title[:80]}")
        os.kill(pid, signal.SIGKILL)
        if "HttpIngress" in titles or "ProxyActor" in titles:
            return {Door(node, "http", nodes.url(node))}
        return {Door(node, "grpc", nodes.grpc_address(node))} if "GrpcGateway" in titles else set()

    return strike


def _find(nodes: ThreeNodes, *titles: str) -> tuple[int, int, str]:
    for node in range(NUM_NODES, 0, -1):
        for pid, title in local_cluster.processes(nodes.cluster, node).items():
            if all(part in title for part in titles):
                return node, pid, title
    raise SystemExit(f"no process with {titles} in its title")


def _epoch(nodes: ThreeNodes) -> int:
    """Of the placement that expert hosts follow: it grows with every migration."""
    status = nodes.status()
    return max((host["epoch"] for host in status["hosts"]), default=0) if status else 0


def _doors_of(nodes: ThreeNodes, node: int) -> set[Door]:
    return {Door(node, "http", nodes.url(node)), Door(node, "grpc", nodes.grpc_address(node))}


async def _kill_node(nodes: ThreeNodes) -> set[Door]:
    node = _find(nodes, "AttentionWorker")[0]
    if node == 1:
        raise SystemExit("both attention workers are on the head node")
    progress(f"  kill -9 everything on node {node}")
    await asyncio.to_thread(local_cluster.kill, nodes.cluster, node)
    return _doors_of(nodes, node)


async def _cut_node(nodes: ThreeNodes) -> set[Door]:
    node = _find(nodes, "AttentionWorker")[0]
    progress(f"  node {node} cut off for {_CUT_S:.0f} s")
    local_cluster.set_link(nodes.cluster, node, is_up=False)
    await asyncio.sleep(_CUT_S)
    local_cluster.set_link(nodes.cluster, node, is_up=True)
    return _doors_of(nodes, node)


async def _drain_node(nodes: ThreeNodes) -> set[Door]:
    """Empty a node as an operator does, and use it again: its experts move to other hosts and back while serving."""
    node = _find(nodes, "AttentionWorker")[0]
    answer = await _post_drain(nodes, node, undo=False)
    end_s = time.monotonic() + _RECOVERY_TIMEOUT_S
    while not answer["is_empty"] and time.monotonic() < end_s:
        await asyncio.sleep(1.0)
        answer = await _post_drain(nodes, node, undo=False)
    progress(f"  node {node} drained: empty {answer['is_empty']}, left {answer['left']}; epoch {_epoch(nodes)}")
    if not answer["is_empty"]:
        raise SystemExit(f"node {node} is not empty after {_RECOVERY_TIMEOUT_S:.0f} s: {answer['left']}")
    await _post_drain(nodes, node, undo=True)
    return set()


async def _post_drain(nodes: ThreeNodes, node: int, *, undo: bool) -> dict[str, Any]:
    body = {"node": nodes.cluster.node_ip(node), "undo": undo}
    async with httpx.AsyncClient(trust_env=False, timeout=20) as client:
        answer = await client.post(f"{nodes.url(1)}/drain", json=body)
    return answer.raise_for_status().json()


async def _join_nodes(nodes: ThreeNodes) -> None:
    """Start again what has gone, as Kubernetes does."""
    for node in range(2, NUM_NODES + 1):
        if not await asyncio.to_thread(local_cluster.is_alive, nodes.cluster, node):
            progress(f"  node {node} is started again")
            await asyncio.to_thread(local_cluster.join, nodes.cluster, node)


FAULTS = (
    Fault("attention worker killed", _kill_process("ServeReplica", "AttentionWorker")),
    Fault("expert host killed", _kill_process("ExpertHostActor")),
    Fault("scheduler killed", _kill_process("ray::Scheduler")),
    Fault("Redis killed", _kill_process("valkey-server")),
    Fault("HTTP front end killed", _kill_process("ServeReplica", "HttpIngress")),
    Fault("gRPC front end killed", _kill_process("GrpcGateway")),
    Fault("HTTP proxy killed", _kill_process("ProxyActor")),
    Fault("node drained and used again", _drain_node),
    Fault("node partitioned and healed", _cut_node, _join_nodes),
    Fault("node killed", _kill_node, _join_nodes),
)


def reference_cases(num: int, num_tokens: int) -> list[Case]:
    """Prompts and what transformers says to them, greedily in float32; those at which it nearly says otherwise are left
    out."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from actors.model.seams import cache_argument

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    top_k: int = model.config.num_experts_per_tok
    cache_name = cache_argument(model)
    cases: list[Case] = []
    for text in prompts_of_domains(2 * num):
        prompt = tokenizer(text).input_ids[:_PROMPT_TOKENS]
        ids, past, expected, gap = torch.tensor([prompt]), None, [], 1.0
        with torch.inference_mode():
            for _ in range(num_tokens):
                out = model(ids, use_cache=True, output_router_logits=True, **{cache_name: past})
                first, second = torch.topk(out.logits[0, -1].double(), 2).values.tolist()
                gap = min(gap, (first - second) / max(abs(first), abs(second)))
                for logits in out.router_logits:
                    ranked = torch.topk(torch.softmax(logits[-1].double(), dim=-1), top_k + 1).values
                    gap = min(gap, float((ranked[-2] - ranked[-1]) / ranked[-2]))
                expected.append(int(out.logits[0, -1].argmax()))
                ids, past = torch.tensor([expected[-1:]]), getattr(out, cache_name)
        if gap > _NEAR_TIE:
            cases.append(Case(tuple(prompt), tuple(expected)))
        if len(cases) == num:
            return cases
    raise SystemExit(f"only {len(cases)} of {2 * num} prompts have no near-tie")
