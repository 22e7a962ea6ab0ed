"""YAML files, read strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from esparse_trt.errors import EsparseError


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error: plain YAML takes the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str = "recipe", example: str = "recipes/quickstart.yaml") -> Any:
    """The plain values of a YAML file; errors call it `what`, and name an example of one.

    Raises:
        EsparseError: it cannot be read, or is not UTF-8 or not YAML; names line and column.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise EsparseError(
            f"cannot read the {what}: {error.strerror or error}",
            where=path,
            fix=f"give the path of a {what} file, such as {example}",
        ) from error
    except UnicodeDecodeError as error:
        found = f"not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise EsparseError(found, where=path, fix=f"save the {what} as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else path
        found = f"not valid YAML: {error.problem}"
        raise EsparseError(found, where=place, fix="correct the YAML syntax") from error
    except yaml.YAMLError as error:
        raise EsparseError(f"not valid YAML: {error}", where=path, fix="correct the YAML syntax") from error
