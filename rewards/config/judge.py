"""A value in one sentence, answered yes or no by the chat model: the kind ``judge``."""

from __future__ import annotations

from string import Formatter
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rewards.base import SCORE
from rewards.config.section import Name, Scored

# The question stands last: what several questions share before theirs is read once.
TEMPLATE = "Consider only the last reply. Answer Yes or No. {question}"


class JudgeConfig(Scored):
    """Log-odds that the chat model itself answers yes to a question about the answer.

    The question is put as the user's next message behind the answer, which the model has read
    already: one more token, no more weights.
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

    @property
    def asked(self) -> dict[str, str]:
        """The question of each output."""
        return {SCORE: self.question} if self.question is not None else dict(self.questions or {})

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of its outputs."""
        return tuple(self.asked)
