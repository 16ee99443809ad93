"""The bodies of OpenAI's chat completions, completions and models, as far as m3dist serves them.

The models validate what comes in and document both directions (/openapi.json). Fields that m3dist does not know are
ignored, as compatible servers do; those in REFUSED would silently get another answer than the client asked for.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from m3dist.gateway.errors import BadRequest

INT32, INT64 = 2**31, 2**63
MOST_ITEMS = 2**14  # in lists of objects
MOST_BIASES = 2**13


class Model(BaseModel):
    """Strict: "1" is no number and 1 no truth. Fields that are not known are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)


class Body(Model):
    """A whole request; `model_extra` has the fields that are not known, for `refuse`."""

    model_config = ConfigDict(extra="allow")


def _whole(value: Any) -> Any:
    """1.0 is an integer in JSON Schema, and what some clients write."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def few(value: Any) -> Any:
    """Looked at before the entries are, each of which could be an error."""
    if isinstance(value, dict) and len(value) > MOST_BIASES:
        raise ValueError(f"must have at most {MOST_BIASES} entries")
    return value


WHOLE = BeforeValidator(_whole)
Count = Annotated[int, Field(ge=1, lt=INT32), WHOLE]
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=INT32)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Schema = dict[str, Any]  # JSON Schema

T = TypeVar("T")
# Lists end at their first error: of a million wrong items, a million errors would be kept.
Items = Annotated[list[T], Field(max_length=MOST_ITEMS, fail_fast=True)]
SomeItems = Annotated[list[T], Field(min_length=1, max_length=MOST_ITEMS, fail_fast=True)]
StopStrings = Annotated[list[StopString], Field(max_length=16, fail_fast=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Fields that m3dist does not have, and that mean something

# name -> (values that mean nothing, what to do)
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "functions": ((None, []), "use tools"),
    "function_call": ((None, "none", "auto"), "use tool_choice"),
    "audio": ((None,), "m3dist answers in text"),
    "modalities": ((None, ["text"]), "m3dist answers in text"),
    "web_search_options": ((None,), "m3dist has no tools of its own"),
    "moderation": ((None,), "m3dist does not moderate"),
    "suffix": ((None, ""), "m3dist only continues a prompt"),
    "best_of": ((None, 1), "use n"),
    "use_beam_search": ((None, False), "m3dist samples"),
    "min_tokens": ((None, 0), "m3dist ends an answer where the model does"),
    "bad_words": ((None, []), "use logit_bias"),
    "prompt_logprobs": ((None,), "m3dist gives log probabilities of answers only"),
    "truncate_prompt_tokens": ((None,), "shorten the prompt"),
    "guided_json": ((None,), "use response_format"),
    "guided_regex": ((None,), "use response_format"),
    "guided_choice": ((None,), "use response_format"),
    "guided_grammar": ((None,), "use response_format"),
    "structured_outputs": ((None,), "use response_format"),
    "continue_final_message": ((None, False), "the model begins a message of its own"),
    "add_generation_prompt": ((None, True), "the model begins a message of its own"),
}


def refuse(body: Body, refused: Mapping[str, tuple[tuple[Any, ...], str]]) -> None:
    """Raise BadRequest for a field that is set, that m3dist does not have, and that would change the answer."""
    for name, value in (body.model_extra or {}).items():
        if name in refused and value not in refused[name][0]:
            raise BadRequest(f"{name} is not supported: {refused[name][1]}", name, "unsupported_parameter")


# ---------------------------------------------------------------------------------------------------------------------
# What chat completions and completions have in common


class StreamOptions(Model):
    include_usage: bool | None = None


class Sampled(Body):
    """Fields that say how tokens are chosen. What is absent is the model's default (generation_config.json)."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT32, description="0 and -1: off"), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[dict[str, Bias], BeforeValidator(few)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64), WHOLE] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    user: str | None = None


class Completing(Sampled):
    """What chat completions and completions have in common."""

    n: Annotated[int, Field(ge=1, le=16), WHOLE] | None = None
    max_tokens: Count | None = None
    stop: Annotated[StopString | StopStrings | None, BeforeValidator(lambda stop: None if stop == "" else stop)] = None
    stream_options: StreamOptions | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class PromptTokensDetails(Model):
    cached_tokens: int


class CompletionTokensDetails(Model):
    reasoning_tokens: int


class Usage(Model):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class OpenAIErrorObject(Model):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(Model):
    error: OpenAIErrorObject


# ---------------------------------------------------------------------------------------------------------------------
# Chat completions: what comes in


def refusal_as_text(part: Any) -> Any:
    """A part with the words in which a model refused, as clients send it back to us, as a part with text."""
    if isinstance(part, dict) and part.get("type") == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "text", "text": part["refusal"]}
    return part


class TextPart(Model):
    """A part of a message. m3dist reads text only."""

    type: Literal["text"]
    text: str

    _refusal = model_validator(mode="before")(refusal_as_text)


class FunctionCalled(Model):
    name: ToolName
    arguments: str | Schema = Field(description="a JSON object, as text or as it is")


class ToolCall(Model):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCalled


class ChatMessage(Model):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = Field(None, description="the same, by another name")
    tool_calls: Items[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _by_role(self) -> "ChatMessage":
        if self.role != "assistant":
            if self.content is None:
                raise ValueError(f"of role {self.role} must have content")
            if self.tool_calls:
                raise ValueError(f"of role {self.role} cannot have tool_calls")
        return self


class Function(Model):
    name: ToolName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Model):
    type: Literal["function"]
    function: Function


class NamedFunction(Model):
    name: ToolName


class NamedTool(Model):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Model):
    name: str | None = None
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Model):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _with_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("of type json_schema must have json_schema")
        return self


class TemplateOptions(Model):
    """The chat template's own options, by the names that vLLM's users know."""

    thinking_mode: Literal["enabled", "adaptive", "disabled"] | None = None
    enable_thinking: bool | None = None


class ChatRequest(Completing):
    messages: SomeItems[ChatMessage]
    max_completion_tokens: Count | None = None
    tools: Items[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: TemplateOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Chat completions: what goes out


class TopLogprob(Model):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Model):
    """Of every token of the answer, reasoning and the markup of tool calls included."""

    content: list[TokenLogprob]


class FunctionAnswered(Model):
    name: str
    arguments: str


class ToolCallAnswered(Model):
    id: str
    type: Literal["function"]
    function: FunctionAnswered


class AnswerMessage(Model):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    tool_calls: list[ToolCallAnswered] = []


class ChatChoice(Model):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Model):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


# ---------------------------------------------------------------------------------------------------------------------
# Completions


PromptText = Annotated[str, Field(min_length=1)]
Prompts = Annotated[list[T], Field(min_length=1, max_length=128, fail_fast=True)]


class CompletionRequest(Completing):
    prompt: PromptText | TokenIds | Prompts[PromptText] | Prompts[TokenIds]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None


class CompletionLogprobs(Model):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Model):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(Model):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


# ---------------------------------------------------------------------------------------------------------------------
# Models: one card for both APIs


class ModelCard(Model):
    """OpenAI's object, with the fields of Anthropic's beside them."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None = Field(description="tokens of one prompt and its answer; null until the ranks are ready")
    type: Literal["model"]
    display_name: str
    created_at: str


class ModelList(Model):
    object: Literal["list"]
    data: list[ModelCard]
    has_more: bool
    first_id: str | None
    last_id: str | None
