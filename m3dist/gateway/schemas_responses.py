"""The bodies of OpenAI's /v1/responses: the part of it that a server without memory and tools of its own can serve."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from m3dist.gateway.schemas_openai import (
    WHOLE,
    Count,
    Effort,
    Items,
    Model,
    NamedFunction,
    Sampled,
    Schema,
    SomeItems,
    ToolName,
    few,
    refusal_as_text,
)

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "previous_response_id": ((None,), "m3dist keeps no responses: send the whole conversation as input"),
    "conversation": ((None,), "m3dist keeps no conversations: send the whole conversation as input"),
    "store": ((None, False), "m3dist keeps no responses: leave it out or send false"),
    "background": ((None, False), "m3dist answers while the client waits"),
    "prompt": ((None,), "m3dist keeps no prompts: send it as instructions and input"),
    "truncation": ((None, "disabled"), "m3dist never shortens a conversation"),
    "max_tool_calls": ((None,), "m3dist has no tools of its own"),
    "moderation": ((None,), "m3dist does not moderate"),
}


# ---------------------------------------------------------------------------------------------------------------------
# What comes in


class InputText(Model):
    """A part of a message. m3dist reads text only."""

    type: Literal["input_text", "output_text", "text"]
    text: str

    _refusal = model_validator(mode="before")(refusal_as_text)


class InputMessage(Model):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Items[InputText]


class InputCall(Model):
    type: Literal["function_call"]
    call_id: str
    name: ToolName
    arguments: str


class InputCallOutput(Model):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Items[InputText]


class ReasoningText(Model):
    type: Literal["reasoning_text"]
    text: str


class InputReasoning(Model):
    """Reasoning of an earlier answer, as it was given."""

    type: Literal["reasoning"]
    content: Items[ReasoningText] | None = None


def _kind(item: Any) -> Any:
    """What an input item is; messages need not say it."""
    return item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="input_item",
        custom_error_message=(
            "Input should be an item of type message, function_call, function_call_output or reasoning"
        ),
    ),
]


class FunctionTool(Model):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class NamedFunctionTool(NamedFunction):
    type: Literal["function"]


class TextFormat(Model):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _with_schema(self) -> "TextFormat":
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("of type json_schema must have schema")
        return self


class TextOptions(Model):
    format: TextFormat | None = None


class ReasoningOptions(Model):
    effort: Effort | None = None


class ResponseRequest(Sampled):
    input: str | SomeItems[InputItem]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    tools: Items[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    include: Items[str] | None = None
    metadata: Annotated[dict[str, str], BeforeValidator(few)] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# What goes out


class OutputTopLogprob(Model):
    token: str
    bytes: list[int]
    logprob: float


class OutputLogprob(OutputTopLogprob):
    top_logprobs: list[OutputTopLogprob]


class OutputText(Model):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[OutputLogprob]


Status = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(Model):
    type: Literal["message"]
    id: str
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class OutputReasoning(Model):
    type: Literal["reasoning"]
    id: str
    status: Status
    summary: list[Any]
    content: list[ReasoningText]


class OutputCall(Model):
    type: Literal["function_call"]
    id: str
    status: Status
    call_id: str
    name: str
    arguments: str


class InputTokensDetails(Model):
    cached_tokens: int
    cache_write_tokens: int = Field(description="always 0: caching needs no asking, and is not counted")


class OutputTokensDetails(Model):
    reasoning_tokens: int


class ResponseUsage(Model):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Model):
    code: Literal["server_error", "invalid_prompt"]
    message: str


class IncompleteDetails(Model):
    reason: Literal["max_output_tokens"]


class Response(Model):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[OutputMessage | OutputReasoning | OutputCall]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    usage: ResponseUsage | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: ReasoningOptions
    store: Literal[False]
    temperature: float | None
    text: TextOptions
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["disabled"]
