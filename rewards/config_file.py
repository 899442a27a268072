"""Reads a rewards file; every complaint names the line, the field and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from rewards import config
from rewards.config import RewardsConfig
from rewards.errors import RewardConfigError

FieldPath = tuple[str | int, ...]

# Which schema stands behind a component of an error's path, for "did you mean".
_SCHEMAS: dict[str, type[BaseModel]] = {
    "sequence_classifier": config.SequenceClassifierConfig,
    "vllm_pooling": config.VllmPoolingConfig,
    "causal_lm": config.CausalLmConfig,
    "likelihood": config.LikelihoodConfig,
    "embedding": config.EmbeddingConfig,
    "process_reward": config.ProcessRewardConfig,
    "lexical": config.LexicalConfig,
    "sampler_logprob": config.SamplerLogprobConfig,
    "remote": config.RemoteConfig,
    "python": config.PythonConfig,
    "vader": config.VaderConfig,
    "judge": config.JudgeConfig,
    "verifiable": config.RegexCheckConfig,
    "regex": config.RegexCheckConfig,
    "json_schema": config.JsonSchemaCheckConfig,
    "number": config.NumberCheckConfig,
    "words": config.WordLimitsConfig,
    "required": config.TermsCheckConfig,
    "banned": config.TermsCheckConfig,
    "text": config.TextInput,
    "pair": config.PairInput,
    "chat": config.ChatInput,
    "output": config.OutputConfig,
}


def read_config(path: Path) -> tuple[RewardsConfig, dict[FieldPath, int]]:
    """Return the validated file, and the line of each of its fields.

    Raises
    ------
    RewardConfigError
        When the file cannot be read, is no YAML, or breaks the schema.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RewardConfigError(path, None, "", f"cannot read the rewards file: {error}") from error
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        lines: dict[FieldPath, int] = {}
        if node is not None:
            _collect_lines(path, node, (), lines)
        data = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        raise RewardConfigError(path, line, "", f"no valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise RewardConfigError(path, None, "", f"no valid YAML: {error}") from error
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        problem = "the file must hold the keys version, scorers and values"
        raise RewardConfigError(path, 1, "", problem)
    try:
        settings = RewardsConfig.model_validate(data)
    except ValidationError as error:
        raise _explain(path, error, lines) from error
    _check_references(path, settings, lines)
    return settings, lines


def config_error(
    path: Path, lines: dict[FieldPath, int], field: FieldPath, problem: str
) -> RewardConfigError:
    """Return an error at a field; a field that was left out is reported at its section's line."""
    line = next((lines[field[:n]] for n in range(len(field), 0, -1) if field[:n] in lines), 1)
    return RewardConfigError(path, line, ".".join(map(str, field)), problem)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names the known name closest to this one, and all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}There are: {', '.join(names) or 'none'}"


def _collect_lines(
    path: Path, node: yaml.Node, field: FieldPath, lines: dict[FieldPath, int]
) -> None:
    """Note the line of each field; YAML would let a second equal key win silently: refuse it."""
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            lines[*field, index] = child.start_mark.line + 1
            _collect_lines(path, child, (*field, index), lines)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, child in node.value:
        name = str(key.value)
        line = key.start_mark.line + 1
        if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            problem = "YAML does not read this name as text (yes, no, on, 1, ...); put it in quotes"
            raise RewardConfigError(path, line, ".".join(map(str, (*field, name))), problem)
        if name in seen and name != "<<":
            problem = f"this name stands twice (first on line {seen[name]}); rename or remove one"
            raise RewardConfigError(path, line, ".".join(map(str, (*field, name))), problem)
        seen[name] = line
        lines[*field, name] = line
        _collect_lines(path, child, (*field, name), lines)


def _explain(path: Path, error: ValidationError, lines: dict[FieldPath, int]) -> RewardConfigError:
    """Translate the first complaint of pydantic."""
    # A misspelt field is reported as unknown and, if it was needed, as missing: the former helps.
    first = min(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
    location: Sequence[str | int] = first["loc"]
    # pydantic adds the tag of a union (kind, check, view) and "[key]" to the path; the file has
    # none.
    field: FieldPath = ()
    for position, part in enumerate(location):
        is_tag = location[0] == "scorers" and (
            position == 2
            or (position == 3 and location[2] == "verifiable")
            or (position == 4 and location[3] == "input")
        )
        if part != "[key]" and not (is_tag and part in _SCHEMAS):
            field = (*field, part)
    kind = first["type"]
    context = first.get("ctx", {})
    problem = first["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        problem = f"unknown field; {suggest(str(location[-1]), _known_fields(location))}"
    elif kind == "missing":
        problem = "this field is missing; add it"
    elif kind == "union_tag_invalid":
        key, tag = context["discriminator"].strip("'"), str(context["tag"])
        field = (*field, key)
        tags = [name.strip(" '") for name in context["expected_tags"].split(",")]
        problem = f"unknown {key} {tag!r}; {suggest(tag, tags)}"
    elif kind == "union_tag_not_found":
        key = context["discriminator"].strip("'")
        problem = f"the field {key!r} is missing; add it"
    elif kind == "too_short" or (kind == "dict_type" and first["input"] is None):
        problem = "this section is empty; a rewards file needs at least one value and its scorer"
    elif kind in ("dict_type", "model_type", "model_attributes_type"):
        problem = f"this must be a section with fields of its own, not {first['input']!r}"
    elif "[key]" in location or kind == "string_pattern_mismatch":
        problem = "a name is letters, digits, _ - and . only, 64 at most, and starts with a letter"
    elif kind == "literal_error":
        problem = f"{problem}, not {first['input']!r}"
    return config_error(path, lines, field, problem)


def _known_fields(location: Sequence[str | int]) -> list[str]:
    """Return the fields that the section of an unknown one could have."""
    schema: type[BaseModel] = RewardsConfig
    if location[0] == "scorers" and len(location) > 1:
        section = "output" if "outputs" in location[3:-1] else str(location[-2])
        schema = _SCHEMAS[section]
        if section == "output" and location[2] == "causal_lm":
            schema = config.TokenOutputConfig
    elif location[0] == "values" and "transform" in location[2:-1]:
        schema = config.TransformConfig
    elif location[0] == "values" and len(location) > 1:
        depths = (config.ValueConfig, config.CheckConfig, config.MessageConfig)
        schema = depths[(len(location) - 3) // 2]
    return [field.alias or name for name, field in schema.model_fields.items()]


def _check_references(path: Path, settings: RewardsConfig, lines: dict[FieldPath, int]) -> None:
    for name, value in settings.values.items():
        field = "from" if value.source is not None else "mix"
        for source in value.weights:
            _check_source(path, settings, lines, ("values", name, field), source)
        if value.watch is not None:
            _check_source(path, settings, lines, ("values", name, "watch"), value.watch)
            if value.watch in value.weights:
                problem = f"{value.watch} is what is optimised; watch another scorer"
                raise config_error(path, lines, ("values", name, "watch"), problem)


def _check_source(
    path: Path, settings: RewardsConfig, lines: dict[FieldPath, int], field: FieldPath, source: str
) -> None:
    scorer, output = split_source(source, settings.scorers)
    if scorer not in settings.scorers:
        problem = f"no scorer {scorer!r}; {suggest(scorer, settings.scorers)}"
        raise config_error(path, lines, field, problem)
    outputs = settings.scorers[scorer].output_names
    if output is None and len(outputs) > 1:
        problem = f"{scorer} has several outputs: write {scorer}.{outputs[0]}, or another of them; "
        raise config_error(path, lines, field, problem + suggest("", outputs))
    if output is not None and output not in outputs:
        problem = f"{scorer} has no output {output!r}; {suggest(output, outputs)}"
        raise config_error(path, lines, field, problem)


def split_source(source: str, scorers: Container[str]) -> tuple[str, str | None]:
    """Return scorer and output of ``scorer`` or ``scorer.output``; names may hold dots too."""
    if source in scorers or "." not in source:
        return source, None
    scorer, _, output = source.rpartition(".")
    return (scorer, output) if scorer in scorers else (source, None)
