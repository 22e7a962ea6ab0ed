"""Files of the model repository from the templates beside this module."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def copy_template(name: str, target: Path) -> None:
    """Write a template that has nothing to fill in: Python code for the server."""
    text = (resources.files("esparse_trt.deploy") / "templates" / name).read_text(encoding="utf-8")
    target.write_text(text, encoding="utf-8")


def render(template: str, **facts: Any) -> str:
    """The text of a template; a fact that it needs and does not get is an error."""
    environment = Environment(
        loader=PackageLoader("esparse_trt.deploy"),
        autoescape=False,  # protobuf text and Markdown; names are restricted by the recipe's schema
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**facts)
