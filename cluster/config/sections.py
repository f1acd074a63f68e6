"""The sections of the configuration tree: names, types, defaults and bounds. Unknown keys are errors.

Sizes are bytes or strings like "512MiB"; an expert cache may also be a percentage of the model's routed-expert bytes.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationInfo, field_validator, model_validator

from cluster.application import DEFAULT_APPLICATION, ApplicationId
from cluster.config.sizes import AUTO, check_cache_size, parse_size

DEFAULT_MODEL = "moesaic-demo"


class Section(BaseModel):
    """One section; frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Section):
    """Which model, and how it computes."""

    path: str = Field(
        default=DEFAULT_MODEL, description="local Hugging Face directory, hub id, or the embedded moesaic-demo"
    )
    served_name: str | None = Field(default=None, description="name clients use; default: the last part of path")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto", description="auto: bfloat16 for bfloat16 checkpoints, else float32"
    )
    max_model_len: int | None = Field(
        default=None, ge=16, description="longest sequence in tokens; default: the model's"
    )
    generation_config: Literal["auto", "none"] = Field(
        default="auto", description="auto: requests that say nothing of sampling get what the model's author chose"
    )
    fingerprint: Literal["sampled", "full"] = Field(
        default="sampled", description="how weights are told apart: by samples of every file, or by all bytes (minutes)"
    )


class AttentionConfig(Section):
    """The attention worker: batching, KV cache, threads."""

    kv_cache: str = Field(
        default=AUTO, description="KV cache bytes per worker; auto: one sequence of the model's length, at least 256MiB"
    )
    block_size: int = Field(default=16, ge=1, le=256, description="tokens per KV block")
    max_batch_tokens: int = Field(default=512, ge=1, description="token rows in one step (prefill chunk bound)")
    max_running: int = Field(default=32, ge=1, description="sequences that decode together")
    workers: int = Field(default=1, ge=1, le=1024, description="attention workers (Serve replicas)")
    max_workers: int | None = Field(
        default=None, ge=1, le=1024, description="waiting prompts may start more workers, up to this many"
    )
    max_queue: int = Field(default=256, ge=0, description="requests that may wait; more are answered 429")
    co_batching: bool = Field(
        default=True, description="of waiting requests, those whose experts the running ones use too go first"
    )
    threads: int = Field(
        default=0, ge=0, description="compute threads per worker; 0: its share of all cores but one, at least one"
    )

    @field_validator("kv_cache")
    @classmethod
    def _is_size(cls, value: str) -> str:
        if value != AUTO:
            parse_size(value)
        return value

    @model_validator(mode="after")
    def _may_grow(self) -> Self:
        if self.max_workers is not None and self.max_workers < self.workers:
            raise ValueError(
                f"max_workers {self.max_workers} is below workers {self.workers}; raise it or leave it out"
            )
        return self


class ExpertsConfig(Section):
    """The expert memory of workers and expert hosts, and the way between them."""

    cache: str = Field(
        default=AUTO,
        description="a worker's budget: bytes, percent of the routed-expert bytes, or auto (all; with hosts none)",
    )
    eviction: Literal["lru", "lfu", "mrs", "eam", "fmoe", "moesaic"] = Field(
        default="moesaic", description="what leaves a full memory first"
    )
    prediction: Literal["none", "next-gate", "whole-layer", "eam", "fmoe", "moesaic"] = Field(
        default="moesaic", description="what is fetched ahead of need"
    )
    ram_tier: str = Field(
        default="0", description="slower memory between disk and the budget of cache: bytes or percent; 0: none"
    )
    remote_tier: str = Field(
        default="0", description="experts that each other node keeps in Ray's object store: bytes or percent; 0: none"
    )
    link_gb_per_s: float = Field(
        default=0.0, ge=0, description="declared rate of the link from ram_tier, emulated; 0: as fast as memory copies"
    )
    policy_state: str | None = Field(
        default=None, description="file to start from and to save to what eviction and prediction have learned"
    )
    load_timeout_s: float = Field(
        default=30.0, gt=0, le=3600, description="an expert that takes longer to load fails the requests that need it"
    )
    hosts: int = Field(default=0, ge=0, le=1024, description="expert hosts: processes that own and compute experts")
    max_hosts: int | None = Field(
        default=None, ge=1, le=1024, description="load may start more hosts, up to this many; default: as many as hosts"
    )
    host_cache: str = Field(
        default=AUTO,
        description="bytes of experts that one host holds, or percent of all; auto: those it owns and an eighth for "
        "replicas; less: the rest is read from disk when asked for",
    )
    host_threads: int = Field(
        default=0, ge=0, description="compute threads per host; 0: its share of all cores, at least one"
    )
    host_timeout_s: float = Field(
        default=10.0, gt=0, le=600, description="a host that takes longer for a layer is taken for lost"
    )
    carrier: Literal["auto", "shared_memory", "grpc", "actor_call"] = Field(
        default="auto", description="how rows reach a host; auto: shared memory where there is any, else gRPC"
    )
    checksums: bool = Field(default=False, description="check the arrays of every frame, for suspected transports")
    max_frame_bytes: str = Field(
        default="256MiB", description="largest message between a worker and a host over gRPC; larger ones are refused"
    )
    max_streams: int = Field(
        default=64, ge=1, le=4096, description="gRPC streams that a host serves at once: one for each worker"
    )
    keepalive_s: float = Field(
        default=2.0, ge=0.1, le=600, description="a silent gRPC peer is asked after this long, lost after thrice that"
    )
    io_threads: int = Field(default=3, ge=1, le=64, description="threads that read experts from disk")
    direct_io: Literal["auto", "never"] = Field(
        default="auto", description="never: buffered reads that drop the page cache"
    )

    @field_validator("max_frame_bytes")
    @classmethod
    def _is_frame_size(cls, value: str) -> str:
        if not 2**16 <= parse_size(value) <= 2**30:
            raise ValueError("a frame has 64 KiB to 1 GiB")
        return value

    @field_validator("cache", "host_cache", "ram_tier", "remote_tier", mode="before")
    @classmethod
    def _is_cache_size(cls, value: object, info: ValidationInfo) -> str:
        if value != AUTO or info.field_name not in ("cache", "host_cache"):
            check_cache_size(str(value))
        return str(value)

    @model_validator(mode="after")
    def _may_grow(self) -> Self:
        if self.max_hosts is not None and self.max_hosts < self.hosts:
            raise ValueError(f"max_hosts {self.max_hosts} is below hosts {self.hosts}; raise it or leave it out")
        return self


class RedisConfig(Section):
    """Where activation statistics are aggregated."""

    url: str | None = Field(default=None, description="redis://[:password@]host:port/db; wins over the embedded server")
    embedded: bool = Field(default=True, description="start a Valkey of our own when no url is given")


class FrontendConfig(Section):
    """HTTP front end."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    api_key: SecretStr | None = Field(
        default=None, description="clients must send it, as a bearer token or as X-Api-Key"
    )
    operator_key: SecretStr | None = Field(
        default=None, description="operators must send it to see or change how the server works; it opens all else, too"
    )
    operator_origins: tuple[str, ...] = Field(
        default=(), description="web pages that may call operator routes: https://console.example; default: none"
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(), description="names under which operator routes are called; default: without keys no public name"
    )
    status_max_age_s: float = Field(
        default=1.0, ge=0, le=60, description="/status, /ready and /metrics tell at most this old a state"
    )
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024, description="of one request, decompressed")
    max_arriving_bytes: int = Field(
        default=256 * 2**20, ge=1024, description="of all request bodies that are still arriving; more are answered 429"
    )
    input_threads: int = Field(
        default=2, ge=1, le=64, description="threads that read bodies, render chat templates and tokenise"
    )
    max_input_queue: int = Field(
        default=64, ge=0, description="requests that may wait to be read; more are answered 429"
    )
    cors_origins: tuple[str, ...] = Field(
        default=(), description="origins whose pages may call from a browser, like https://chat.example.org; * is all"
    )
    cors_credentials: bool = Field(default=False, description="such pages may send cookies and HTTP authentication")
    strict: bool = Field(
        default=False, description="refuse request fields that are not known; else they are named in a header"
    )
    root_path: str = Field(
        default="",
        pattern=r"^(/[A-Za-z0-9._~-]+)*$",
        description="prefix that a proxy in front leaves on paths, such as /llm; without it they are served too",
    )
    force_include_usage: bool = Field(
        default=False, description="every chunk of every stream has usage, whatever the request says"
    )
    per_request_metrics: bool = Field(
        default=False, description="answers of one choice tell how long they waited and took, in `metrics`"
    )
    return_tokens_as_token_ids: bool = Field(
        default=False, description="log probabilities name tokens as token_id:N, whatever the request says"
    )
    max_allowed_token_ids: int = Field(default=16384, ge=1, description="entries of allowed_token_ids of a request")
    max_logit_bias: int = Field(default=1024, ge=1, description="entries of logit_bias of a request")
    max_bad_words: int = Field(default=256, ge=1, description="entries of bad_words of a request")
    max_stop: int = Field(default=16, ge=1, description="entries of stop of a request")
    max_logprob_token_ids: int = Field(default=1024, ge=1, description="entries of logprob_token_ids of a request")
    max_stop_token_ids: int = Field(default=128, ge=1, description="entries of stop_token_ids of a request")
    request_timeout_s: float = Field(default=600.0, gt=0)
    drain_timeout_s: float = Field(default=30.0, ge=0)
    max_logprobs: int = Field(
        default=20, ge=0, description="most log-probabilities at one position; clients get these many for -1"
    )
    keep_alive_s: float = Field(default=15.0, gt=0, description="an SSE comment after this long without a token")


class GrpcConfig(Section):
    """gRPC front end. API key, request timeout and drain timeout are those of `frontend`."""

    enabled: bool = True
    host: str | None = Field(default=None, description="address to listen on; default: that of frontend")
    port: int = Field(default=50051, ge=1, le=65535)
    max_message_bytes: int = Field(default=16 * 2**20, ge=1024, description="of one message, both ways")
    reflection: bool = Field(default=True, description="clients may ask which services there are")
    tls_cert: str | None = Field(default=None, description="PEM file with the certificate chain; default: plain text")
    tls_key: str | None = Field(default=None, description="PEM file with the private key of tls_cert")
    tls_client_ca: str | None = Field(
        default=None, description="PEM file; clients must have a certificate signed by one of these"
    )
    max_concurrent_streams: int = Field(default=1024, ge=1, description="calls at once on one connection; more wait")
    keepalive_s: float = Field(default=60.0, ge=1, description="a silent client is asked after this long")
    keepalive_timeout_s: float = Field(default=20.0, ge=1, description="and lost after this long without an answer")
    max_connection_age_s: float | None = Field(
        default=None, ge=1, description="clients reconnect after this long, so that a balancer can spread them"
    )

    @model_validator(mode="after")
    def _has_whole_tls(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key belong together; give both or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        return self


class SchedulerConfig(Section):
    """The central scheduler: routing, placement, migration, scale."""

    routing: Literal["semantic", "random", "least-loaded", "prefix-affinity"] = Field(
        default="semantic", description="how an attention worker is chosen for a request"
    )
    prompt_clusters: int = Field(default=16, ge=1, le=256, description="most clusters that prompts are sorted into")
    half_life_s: float = Field(default=1800.0, gt=0, description="after so long an activation counts half")
    report_interval_s: float = Field(default=1.0, gt=0, le=60, description="workers and hosts report this often")
    placement: Literal["auto", "fixed"] = Field(
        default="auto", description="auto: experts move between hosts when that pays; fixed: they stay"
    )
    placement_interval_s: float = Field(default=60.0, gt=0, description="a plan is made this often")
    moved_per_minute: str = Field(
        default="1GiB", description="bytes of experts that may move between hosts in a minute"
    )
    scale_up_after_s: float = Field(
        default=5.0, ge=0, description="more load must last so long to bring more workers or hosts, up to their maximum"
    )
    scale_down_after_s: float = Field(
        default=300.0, ge=0, description="less load must last so long to send the surplus away again"
    )

    @field_validator("moved_per_minute")
    @classmethod
    def _is_size(cls, value: str) -> str:
        parse_size(value)
        return value


class MetricsConfig(Section):
    """What Prometheus sees."""

    per_expert: bool = Field(
        default=False, description="a series for every layer, expert and phase; thousands for a large model"
    )


class RayConfig(Section):
    """Which Ray cluster to join."""

    address: str | None = Field(default=None, description="of a running cluster; default: a local Ray of our own")
    namespace: str = DEFAULT_APPLICATION.namespace
    application: str = Field(
        default=DEFAULT_APPLICATION.name,
        pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$",
        description="names all that belongs to this deployment; a second one on the same Ray needs another",
    )
    worker_resources: dict[str, float] = Field(
        default_factory=dict, description="Ray resources that an attention worker needs, to choose its nodes"
    )
    host_resources: dict[str, float] = Field(
        default_factory=dict, description="Ray resources that an expert host needs, to choose its nodes"
    )

    @property
    def application_id(self) -> ApplicationId:
        """Whose processes and keys these are."""
        return ApplicationId(self.namespace, self.application)
