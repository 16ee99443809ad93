"""A request on its way to the engine: what arrives is what was sent, or is refused by the name of its field."""

import json
import math

import pytest

from m3dist.engine.request import Request, RequestError
from m3dist.sampling import Sampling

VOCABULARY, CONTEXT = 1000, 64
GOOD = {"id": 3, "client": "a", "prompt": [1, 2, 3]}


def parsed(**values) -> Request:
    return Request.from_json(GOOD | values, VOCABULARY, CONTEXT)


def test_what_arrives_is_what_was_sent():
    request = Request(
        id=7,
        client="somebody",
        prompt=tuple(range(20)),
        emitted=(5, 999),
        max_tokens=30,
        stop_ids=(2, 4),
        sampling=Sampling(temperature=0.5, logit_bias={17: -100.0}, repetition_penalty=1.1, logprobs=0, seed=-(2**70)),
        grammar="start: /a+/",
    )
    assert Request.from_json(json.loads(json.dumps(request.to_json())), VOCABULARY, CONTEXT) == request


def test_what_is_left_out_has_its_default():
    assert parsed() == Request(3, "a", (1, 2, 3))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", -1),
        ("id", True),
        ("id", "3"),
        ("client", 3),
        ("prompt", []),
        ("prompt", [VOCABULARY]),
        ("prompt", [-1]),
        ("prompt", [True]),
        ("prompt", [1.0]),
        ("prompt", "text"),
        ("prompt", [1] * CONTEXT),  # nothing left for an answer
        ("emitted", [VOCABULARY]),
        ("stop_ids", [VOCABULARY]),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("grammar", 5),
    ],
)
def test_a_bad_field_is_named(field, value):
    with pytest.raises(RequestError, match=f"^{field}: "):
        parsed(**{field: value})


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, 10**400, True, "1"]),
        ("top_p", [0, 1.1, math.nan]),
        ("top_k", [-1, 2**31, 1.0]),
        ("min_p", [-0.1, 1.1]),
        ("presence_penalty", [-2.1, 2.1, None]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("repetition_penalty", [0, -1, 1e300]),
        ("seed", [None, 1.5]),
        ("logprobs", [-1, 21, True]),
        ("logit_bias", [{"1000": 1}, {"-1": 1}, {"1": math.nan}, {"1": 101}, {"1": None}]),
    ],
)
def test_bad_sampling_is_named(field, values):
    for value in values:
        with pytest.raises(RequestError, match=f"^{field}: "):
            parsed(sampling={field: value})


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": 5},
        {"sampling": None},
        {"sampling": {"temper": 1}},
        {"sampling": {"logit_bias": {"a": 1}}},
        {"sampling": {"logit_bias": [1]}},
        {"colour": "red"},
    ],
)
def test_what_is_no_request_is_refused(values):
    with pytest.raises(RequestError):
        parsed(**values)
    with pytest.raises(RequestError):
        Request.from_json({}, VOCABULARY, CONTEXT)
