"""Run the code in docs/walkthrough.md and put what it prints below it, so that the text stays true.

python -m tools.walkthrough    write docs/walkthrough.md and its images again
"""

import contextlib
import io
import re
from pathlib import Path

from support.files import write_text

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n.*?```\n)?", re.DOTALL)


def rerun(markdown: str, images: Path) -> str:
    """The same text with the output of every Python block below it; `images` is where its show() writes."""
    names = {"images": images}

    def execute(block: re.Match) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(block.group(1), names)  # our own file, not input
        output = f"\n```text\n{printed.getvalue()}```\n" if printed.getvalue() else ""
        return f"```python\n{block.group(1)}```\n{output}"

    return BLOCK.sub(execute, markdown)


if __name__ == "__main__":
    page = DOCS / "walkthrough.md"
    write_text(page, rerun(page.read_text(encoding="utf-8"), DOCS / "walkthrough"))
