"""What `helm test` runs: URL [gRPC address]. The server is ready, lists its model, answers; gRPC is healthy."""

import os
import sys

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

url, addresses = sys.argv[1], sys.argv[2:]
key = os.environ.get("MOESAIC__FRONTEND__API_KEY")
headers = {"Authorization": f"Bearer {key}"} if key else {}
with httpx.Client(base_url=url, headers=headers, timeout=120) as client:
    client.get("/ready").raise_for_status()
    model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
    body = {"model": model, "prompt": "Hello", "max_tokens": 4}
    usage = client.post("/v1/completions", json=body).raise_for_status().json()["usage"]
    print(f"{model} at {url}: {usage['completion_tokens']} tokens")
for address in addresses:
    with grpc.insecure_channel(address) as channel:
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30).status
    if status != health_pb2.HealthCheckResponse.SERVING:
        raise SystemExit(f"gRPC at {address} says {health_pb2.HealthCheckResponse.ServingStatus.Name(status)}")
    print(f"gRPC at {address}: serving")
