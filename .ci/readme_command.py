"""Print the README's command that follows `<!-- command: NAME -->`, so that CI runs what the README says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def command(name: str) -> str:
    """The shell text of the fenced block after the marker of that name."""
    match = re.search(
        rf"<!-- command: {name} -->\s*```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.S
    )
    if match is None:
        raise SystemExit(f"README.md has no command called {name!r}")
    return match.group(1)


if __name__ == "__main__":
    print(command(sys.argv[1]))
