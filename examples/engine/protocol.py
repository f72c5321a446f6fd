"""What the body of a completion or a chat completion may ask for, as OpenAI has defined them."""

from typing import Annotated, Any, Literal

from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

Json = dict[str, Any]
Text = Annotated[str, Field(min_length=1)]
# fail_fast: many wrong elements would make as many errors, for seconds in which nobody is served.
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
#: What would change the answer and is not built: refused, unless it asks for nothing.
_ONLY: Json = {
    "n": 1, "best_of": 1, "echo": False, "logprobs": False, "suffix": "", "presence_penalty": 0, "min_tokens": 0,
    "frequency_penalty": 0, "repetition_penalty": 1, "min_p": 0, "logit_bias": {}, "tools": [], "functions": [],
    "response_format": {"type": "text"}, "use_beam_search": False, "stop_token_ids": [],
}  # fmt: skip


class ApiError(Exception):
    """An answer other than 200. param: the field at fault."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, kind = status, "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


class StreamOptions(BaseModel):
    include_usage: StrictBool = False


class Call(BaseModel):
    """What both kinds have in common. Other fields are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | Annotated[list[Text], Field(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    ignore_eos: bool = False
    return_token_ids: bool = False
    cache_salt: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_built(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        given = {name: value for name, value in body.items() if value is not None}
        for name, only in _ONLY.items():
            value = given.get(name, only)
            if value != only or isinstance(value, bool) != isinstance(only, bool):
                raise ApiError(400, f"{name}: not supported by this server", name)
        return given


class Completion(Call):
    max_tokens: int | None = Field(16, ge=1)
    prompt: Text | Tokens | Annotated[list[Text | Tokens], Field(min_length=1, max_length=1)]

    def tokens(self, tokenizer: Any) -> list[int]:
        one: Any = self.prompt if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else self.prompt[0]
        return list(tokenizer(one)["input_ids"] if isinstance(one, str) else one)


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Text
    content: str | Annotated[list[Part], Field(fail_fast=True)]


class Chat(Call):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1)

    def tokens(self, tokenizer: Any) -> list[int]:
        """The ids of the conversation up to where the assistant speaks."""
        said = [m.content if isinstance(m.content, str) else "".join(p.text for p in m.content) for m in self.messages]
        turns = [{"role": message.role, "content": text} for message, text in zip(self.messages, said, strict=True)]
        try:
            return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])
        except (TemplateError, ValueError) as error:  # such as roles that must alternate; or there is none
            raise ApiError(400, f"messages: the model's chat template refuses them: {error}", "messages") from None


def parse(kind: type[Completion | Chat], body: bytes) -> Completion | Chat:
    """``ApiError`` 400 for what is no JSON or is not built, 422 for a field that is not what it must be."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = str(first["loc"][0]) if first["loc"] else "body"
        raise ApiError(400 if first["type"] == "json_invalid" else 422, f"{field}: {first['msg']}", field) from None
