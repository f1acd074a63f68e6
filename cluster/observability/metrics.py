"""Every metric of the front end, declared once. The only file of the control plane that knows prometheus.

Names and meanings follow vLLM's (suffix and unit) under the prefix `moesaic_`. Labels are bounded.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

_FIRST_TOKEN_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
_REQUEST_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


class FrontendMetrics:
    """The metrics of one front end, in a registry of its own so that two can live in one process."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self._successes = Counter(
            "moesaic_request_success", "Sequences that ended, by reason.", ["finished_reason"], registry=registry
        )
        self._first_token_s = Histogram(
            "moesaic_time_to_first_token_seconds",
            "From accepting a sequence to its first token.",
            buckets=_FIRST_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self._inter_token_s = Histogram(
            "moesaic_inter_token_latency_seconds",
            "Between tokens of a sequence; tokens that arrive together share their wait.",
            buckets=_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self._request_s = Histogram(
            "moesaic_e2e_request_latency_seconds",
            "From accepting a sequence to its last token.",
            buckets=_REQUEST_BUCKETS_S,
            registry=registry,
        )
        self._prompt_tokens = Counter("moesaic_prompt_tokens", "Prompt tokens of ended sequences.", registry=registry)
        self._cached_tokens = Counter(
            "moesaic_prompt_tokens_cached", "Prompt tokens found in the KV cache.", registry=registry
        )
        self._generated_tokens = Counter("moesaic_generation_tokens", "Tokens generated.", registry=registry)
        self._rejections = Counter(
            "moesaic_admission_rejections", "Requests turned away, by reason.", ["reason"], registry=registry
        )
        self._http_requests = Counter(
            "moesaic_http_requests", "HTTP responses, by route and status code.", ["route", "code"], registry=registry
        )
        self._in_flight = Gauge(
            "moesaic_num_requests_in_flight", "Generation requests being answered.", registry=registry
        )

    def observe_first_token(self, wait_s: float) -> None:
        """The first token of a sequence came after `wait_s`."""
        self._first_token_s.observe(wait_s)

    def observe_tokens(self, num_tokens: int, wait_s: float) -> None:
        """`num_tokens` more came together after `wait_s`; chunks are small, so each token is observed."""
        for _ in range(num_tokens):
            self._inter_token_s.observe(wait_s / num_tokens)

    def count_sequence(
        self, *, finished_reason: str, wait_s: float, prompt_tokens: int, completion_tokens: int, cached_tokens: int
    ) -> None:
        """A sequence ended: stop, length, abort (the client left) or error."""
        self._successes.labels(finished_reason).inc()
        self._request_s.observe(wait_s)
        self._prompt_tokens.inc(prompt_tokens)
        self._cached_tokens.inc(cached_tokens)
        self._generated_tokens.inc(completion_tokens)

    def count_rejection(self, reason: str) -> None:
        """A request was turned away before any work: queue_full, unavailable or draining."""
        self._rejections.labels(reason).inc()

    def count_http(self, *, route: str, code: int) -> None:
        """A response was sent; `route` is the pattern, never the path a client chose."""
        self._http_requests.labels(route, str(code)).inc()

    def set_in_flight(self, num_requests: int) -> None:
        """Generation requests being answered now."""
        self._in_flight.set(num_requests)

    def text(self) -> str:
        """All of it in Prometheus text format."""
        return generate_latest(self._registry).decode()
