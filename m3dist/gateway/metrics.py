"""What /metrics tells Prometheus. Times are in seconds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from m3dist.gateway.link import listed, mapped, number

FIRST = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)  # bounds of the histograms' buckets
EACH = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2, 5, 10)

router = APIRouter()


class Metrics:
    """Counters and gauges of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.waiting = Gauge("m3dist_requests_waiting", "Requests that wait for a row", registry=registry)
        self.running = Gauge("m3dist_requests_running", "Requests that are being computed", registry=registry)
        self.requests = Counter(
            "m3dist_requests", "Requests by how they ended: stop, length, cancelled, failed", ["end"], registry=registry
        )
        self.responses = Counter("m3dist_http_responses", "HTTP responses by status", ["status"], registry=registry)
        self.tokens_in = Counter("m3dist_prompt_tokens", "Tokens of accepted prompts", registry=registry)
        self.tokens_out = Counter("m3dist_answer_tokens", "Tokens of answers", registry=registry)
        self.first_token = Histogram(
            "m3dist_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            registry=registry,
            buckets=FIRST,
        )
        self.each_token = Histogram(
            "m3dist_time_per_token_seconds", "Between two tokens of an answer", registry=registry, buckets=EACH
        )
        self.ready = Gauge("m3dist_ranks_ready", "1 where the ranks compute, else 0", registry=registry)
        self.restarts = Counter("m3dist_ranks_restarts", "Starts of the ranks after the first", registry=registry)
        self.hits = Counter("m3dist_prefix_cache_hit_tokens", "Prompt tokens that were in the cache", registry=registry)
        self.misses = Counter(
            "m3dist_prefix_cache_miss_tokens", "Prompt tokens that had to be computed", registry=registry
        )
        self.pages = Gauge(
            "m3dist_cache_pages", "Pages of the cache: total, used, cached (used by none)", ["state"], registry=registry
        )
        self.bytes = Gauge(
            "m3dist_cache_bytes", "Bytes of these pages, of all ranks together", ["state"], registry=registry
        )
        self.page_tokens = Gauge("m3dist_cache_page_tokens", "Tokens of a page", registry=registry)
        ranks = ["rank", "host"]
        self.weights = Gauge("m3dist_rank_weights_bytes", "Bytes of weights a rank holds", ranks, registry=registry)
        self.step = Gauge("m3dist_rank_step_seconds", "A step, mean of the last second", ranks, registry=registry)
        self.sum = Gauge(
            "m3dist_rank_sum_seconds",
            "Communication: the sum of one hidden state over all ranks, last measured",
            ranks,
            registry=registry,
        )
        self._page_bytes: int | None = None
        self._prefix = {"hits": 0.0, "misses": 0.0}

    def watch(self, waiting: Callable[[], int], running: Callable[[], int], ready: Callable[[], bool]) -> None:
        """What is asked for at each scrape."""
        self.waiting.set_function(waiting)
        self.running.set_function(running)
        self.ready.set_function(ready)

    def new_life(
        self, hosts: Sequence[str], page_size: int, weights_bytes: Sequence[int], page_bytes: int | None = None
    ) -> None:
        """The ranks are ready, and count from 0. `page_bytes`: of a page, on all ranks; None: they do not say."""
        self.end_life()
        self._hosts, self._page_bytes = list(hosts), page_bytes
        self._prefix = {"hits": 0.0, "misses": 0.0}
        self.page_tokens.set(page_size)
        for rank, size in enumerate(weights_bytes):
            self.weights.labels(*self._labels(rank)).set(size)

    def end_life(self) -> None:
        """The ranks are gone, and what they held."""
        for gauge in (self.weights, self.step, self.sum, self.pages, self.bytes):
            gauge.clear()

    def take_stats(self, stats: Mapping[str, Any]) -> None:
        """Rank 0's stats message. Raises LinkLost where it is none."""
        for state, pages in mapped(stats.get("pages", {}), "stats: pages").items():
            if state in ("total", "used", "cached"):
                self.pages.labels(state).set(number(pages, f"stats: pages: {state}"))
                if self._page_bytes is not None:
                    self.bytes.labels(state).set(pages * self._page_bytes)
        prefix = mapped(stats.get("prefix", {}), "stats: prefix")
        for name, counter in (("hits", self.hits), ("misses", self.misses)):
            now = number(prefix.get(name, 0), f"stats: prefix: {name}")
            counter.inc(max(0.0, now - self._prefix[name]))
            self._prefix[name] = now
        for rank, seconds in enumerate(listed(stats.get("ranks", []), "stats: ranks")[: len(self._hosts)]):
            for name, gauge in (("step_seconds", self.step), ("sum_seconds", self.sum)):
                if (value := mapped(seconds, "stats: ranks").get(name)) is not None:
                    gauge.labels(*self._labels(rank)).set(number(value, f"stats: ranks: {name}"))

    def _labels(self, rank: int) -> tuple[str, str]:
        return str(rank), self._hosts[rank]


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """In Prometheus' text format."""
    registry = request.app.state.services.metrics.registry
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
