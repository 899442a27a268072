"""A value in one sentence, answered yes or no by a chat model: the kind ``judge``."""

from __future__ import annotations

from string import Formatter
from typing import Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from rewards.base import SCORE
from rewards.config.section import Name, Scored, checked_url

# The question stands last: what several questions share before theirs is read once.
TEMPLATE = "Consider only the last reply. Answer Yes or No. {question}"


# What only a judge behind a url has, and what a request sets itself.
_OF_URL = ("model", "token_file", "extra_body", "timeout_s", "retries", "max_concurrent")
_OWN_FIELDS = frozenset(
    {"logprobs", "max_tokens", "messages", "model", "n", "stream", "temperature", "top_logprobs"}
    | {"top_p"}
)


class JudgeConfig(Scored):
    """Log-odds that a chat model answers yes to a question about the answer.

    The question is put as the user's next message behind the answer. Without a url the model that
    wrote the answer is asked, which has read it already: one more token, no more weights. With one,
    texts leave this machine: the url is trusted with them.
    """

    kind: Literal["judge"]
    question: str | None = Field(
        None, min_length=1, description="A question that yes or no answers: Is the reply kind?"
    )
    questions: dict[Name, str] | None = Field(
        None,
        min_length=1,
        description="Instead of `question`: several, by name; a value then comes from scorer.name.",
    )
    template: str = Field(TEMPLATE, description="The user's message; must hold {question} once.")
    yes_words: tuple[str, ...] = Field(
        ("Yes", " Yes", "yes"),
        description="Beginnings of a yes. Of each, only the first token counts.",
    )
    no_words: tuple[str, ...] = Field(("No", " No", "no"), description="Beginnings of a no.")
    url: str | None = Field(
        None,
        description="Another model judges: where an OpenAI-compatible server takes chats, path "
        "included, as in http://127.0.0.1:8000/v1/chat/completions. It has to tell top_logprobs.",
    )
    model: str | None = Field(
        None,
        min_length=1,
        description="Its name there, and part of the fingerprint. Change it when another model "
        "comes to stand behind the url, for nothing else tells.",
    )
    token_file: str | None = Field(
        None, description="File (relative to this one) that holds a bearer token, or API key."
    )
    extra_body: dict[str, JsonValue] = Field(
        {},
        description="Fields added to each request: {chat_template_kwargs: {enable_thinking: false}}"
        " where a model thinks before it answers.",
    )
    timeout_s: float = Field(
        10.0,
        gt=0,
        le=600,
        description="Longest wait, in seconds, for the answer to one question, retries included.",
    )
    retries: int = Field(
        2, ge=0, le=10, description="Further tries after 429, 5xx or a broken connection."
    )
    max_concurrent: int = Field(
        16, ge=1, le=64, description="Most questions at once; each is a request of its own."
    )

    @field_validator("url")
    @classmethod
    def _takes_chats(cls, url: str | None) -> str | None:
        if url is not None and not checked_url(url).path.endswith("/chat/completions"):
            raise ValueError(
                "the url must end with /chat/completions, as in "
                "http://127.0.0.1:8000/v1/chat/completions"
            )
        return url

    @field_validator("extra_body")
    @classmethod
    def _adds(cls, extra_body: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if clash := sorted(_OWN_FIELDS & extra_body.keys()):
            raise ValueError(f"it may not have {clash[0]}: questions set it themselves")
        return extra_body

    @field_validator("template")
    @classmethod
    def _holds_question(cls, template: str) -> str:
        try:
            pieces = list(Formatter().parse(template))
        except ValueError as error:
            raise ValueError(f"{error}; write a literal brace twice: {{{{ or }}}}") from None
        fields = [piece[1:] for piece in pieces if piece[1] is not None]
        if fields != [("question", "", None)]:
            raise ValueError("the template must hold {question} once, and no other placeholder")
        return template

    @field_validator("questions")
    @classmethod
    def _are_questions(cls, questions: dict[str, str] | None) -> dict[str, str] | None:
        for name, question in (questions or {}).items():
            if not question.strip():
                raise ValueError(f"the question {name} is blank; ask something")
        return questions

    @field_validator("yes_words", "no_words", mode="before")
    @classmethod
    def _are_words(cls, words: object) -> object:
        if not isinstance(words, list):
            return words
        if not words:
            raise ValueError("give at least one word")
        for word in words:
            if isinstance(word, bool):
                raise ValueError(
                    "YAML reads Yes, No, yes and no as true and false; put the words in quotes"
                )
            if isinstance(word, str) and not word.strip():
                raise ValueError("a word must not be blank")
        return tuple(words)

    @model_validator(mode="after")
    def _asks(self) -> JudgeConfig:
        if (self.question is None) == (self.questions is None):
            raise ValueError("give either question or questions, and not both")
        if both := set(self.yes_words) & set(self.no_words):
            raise ValueError(f"{min(both)!r} is both a yes and a no; remove one")
        return self

    @model_validator(mode="after")
    def _says_who(self) -> JudgeConfig:
        if self.url is not None and self.model is None:
            raise ValueError("a judge behind a url needs model, its name there")
        given = [name for name in _OF_URL if name in self.model_fields_set]
        if self.url is None and given:
            raise ValueError(
                f"{given[0]} is of a judge behind a url, and without one the chat model itself is "
                f"asked; give a url, or leave {given[0]} out"
            )
        return self

    @property
    def asked(self) -> dict[str, str]:
        """The question of each output."""
        return {SCORE: self.question} if self.question is not None else dict(self.questions or {})

    @property
    def put(self) -> list[str]:
        """What is asked, in the order of the outputs: the questions in their template."""
        return [self.template.format(question=question) for question in self.asked.values()]

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of its outputs."""
        return tuple(self.asked)
