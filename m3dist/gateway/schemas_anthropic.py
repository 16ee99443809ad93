"""The bodies of Anthropic's API: /v1/messages and /v1/messages/count_tokens, as far as m3dist serves them."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from m3dist.gateway.schemas_openai import (
    INT32,
    WHOLE,
    Body,
    Count,
    Items,
    Model,
    Schema,
    SomeItems,
    StopStrings,
    ToolName,
)

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "container": ((None,), "m3dist runs no code"),
    "mcp_servers": ((None, []), "m3dist connects to no MCP servers: give their tools as tools"),
    "output_format": ((None,), "use output_config.format"),
}


# ---------------------------------------------------------------------------------------------------------------------
# What comes in


class TextBlock(Model):
    type: Literal["text"]
    text: str


class ThinkingBlock(Model):
    """Reasoning of an earlier answer, as it was given; its signature says nothing here."""

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(Model):
    """Reasoning of another server, which only that one can read: left out."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(Model):
    type: Literal["tool_use"]
    id: str
    name: ToolName
    input: dict[str, Any]


class ToolResultBlock(Model):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Items[TextBlock] | None = None
    is_error: bool | None = None


def _kind(block: Any) -> Any:
    return block.get("type") if isinstance(block, dict) else getattr(block, "type", None)


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[RedactedThinkingBlock, Tag("redacted_thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")],
    Discriminator(
        _kind,
        custom_error_type="content_block",
        custom_error_message="Input should be a block of type text, thinking, tool_use or tool_result",
    ),
]


class Message(Model):
    role: Literal["user", "assistant", "system"]
    content: str | Items[Block]


class AnthropicTool(Model):
    """A tool of the client's. m3dist has none of its own."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: Schema


class ToolChoice(Model):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None


class NamedToolChoice(Model):
    type: Literal["tool"]
    name: ToolName
    disable_parallel_tool_use: bool | None = None


class Thinking(Model):
    """M3 has no budget: what is enabled ends where the model ends it."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[int, Field(ge=1, lt=INT32), WHOLE] | None = None


class OutputFormat(Model):
    type: Literal["json_schema"]
    schema_: Schema = Field(alias="schema")


class OutputConfig(Model):
    format: OutputFormat | None = None


class Metadata(Model):
    user_id: str | None = None


class CountRequest(Body):
    model: str
    messages: SomeItems[Message]
    system: str | Items[TextBlock] | None = None
    tools: Items[AnthropicTool] | None = None
    tool_choice: ToolChoice | NamedToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessageRequest(CountRequest):
    max_tokens: Count
    stop_sequences: StopStrings | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=INT32, description="0: off"), WHOLE] | None = None
    metadata: Metadata | None = None


# ---------------------------------------------------------------------------------------------------------------------
# What goes out


class TextAnswer(TextBlock):
    citations: None = None


class ThinkingAnswer(ThinkingBlock):
    signature: str = Field(description="always empty")


class MessageUsage(Model):
    input_tokens: int = Field(description="of the prompt, those that were not in the cache")
    cache_creation_input_tokens: int = Field(description="always 0: caching needs no asking, and is not counted")
    cache_read_input_tokens: int
    output_tokens: int


class MessageAnswer(Model):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextAnswer | ThinkingAnswer | ToolUseBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(Model):
    input_tokens: int


class AnthropicErrorObject(Model):
    type: str
    message: str


class AnthropicError(Model):
    type: Literal["error"]
    error: AnthropicErrorObject
