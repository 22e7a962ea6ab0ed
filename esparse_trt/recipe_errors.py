"""What is wrong with a recipe, in the words of its author: keys as written, values, the nearest valid one."""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic import ValidationError

_SECTION = ("model_type", "model_attributes_type", "dict_type")  # pydantic: a mapping was expected


def describe(error: ValidationError, schema: dict[str, Any]) -> str:
    """All problems that pydantic found, one a line where there are several.

    Args:
        error: from validating a recipe.
        schema: the recipe's JSON schema, by alias: where valid keys and union tags are looked up.
    """
    lines = list(dict.fromkeys(_describe_one(item, schema) for item in error.errors()))
    return lines[0] if len(lines) == 1 else "\n  - ".join([f"{len(lines)} problems", *lines])


def _describe_one(item: Any, schema: dict[str, Any]) -> str:
    path, nodes = _walk(item["loc"][:-1], schema)
    last = item["loc"][-1] if item["loc"] else ""
    if last not in _tags(nodes):
        path.append(str(last))
    key, value, kind = ".".join(path), item["input"], item["type"]
    context = item.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key `{key}`{_nearest(str(last), _properties(nodes))}"
    if kind == "missing" and isinstance(last, int):
        return f"`{'.'.join(path[:-1])}` has too few values, got {value!r}"
    if kind == "missing":
        return f"`{key}` is missing"
    if kind == "union_tag_invalid":
        tags = re.findall(r"'([^']*)'", context["expected_tags"])
        return f"`{key}.source`: unknown value{_nearest(context['tag'], tags)}, got {context['tag']!r}"
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", context["expected"])
        return f"`{key}`: unknown value{_nearest(str(value), options)}, got {value!r}"
    if kind in _SECTION:
        found = "nothing" if value is None else repr(value)
        return f"`{key}` must be a section with keys of its own, got {found}"
    if kind == "value_error":  # raised by a validator of ours, which names the value itself
        return f"`{key}`: {context['error']}"
    return f"`{key}`: {item['msg'].replace('Input should', 'must')}, got {value!r}"


def _nearest(word: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(word, valid, n=1)
    hint = f"; did you mean `{near[0]}`?" if near else ""
    return f"{hint} (valid: {', '.join(valid)})"


# --- the JSON schema -----------------------------------------------------------------------------------


def _walk(loc: tuple[Any, ...], schema: dict[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """The keys of `loc` as a recipe spells them, and the schema nodes there.

    Inside a union pydantic puts the chosen tag into the location, where the recipe has no key.
    """
    path: list[str] = []
    nodes = _flat([schema], schema)
    for part in loc:
        if part in (tags := _tags(nodes)):
            nodes = _flat([tags[part]], schema)
            continue
        path.append(str(part))
        found = [node["properties"][part] for node in nodes if part in node.get("properties", {})]
        for rest in ("additionalProperties", "items"):
            found += [node[rest] for node in nodes if isinstance(node.get(rest), dict)]
        nodes = _flat(found, schema)
    return path, nodes


def _flat(nodes: list[dict[str, Any]], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes with references followed and alternatives spread; tagged unions stay whole."""
    flat = []
    for node in nodes:
        if "$ref" in node:
            flat += _flat([schema["$defs"][node["$ref"].rsplit("/", 1)[1]]], schema)
        elif "anyOf" in node:
            flat += _flat(node["anyOf"], schema)
        else:
            flat.append(node)
    return flat


def _tags(nodes: list[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    mappings = [node["discriminator"]["mapping"] for node in nodes if "discriminator" in node]
    return {tag: {"$ref": reference} for mapping in mappings for tag, reference in mapping.items()}


def _properties(nodes: list[dict[str, Any]]) -> list[str]:
    return [key for node in nodes for key in node.get("properties", {})]
