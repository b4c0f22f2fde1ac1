"""Run the code in walkthrough.md and put what it prints below it, so that the text cannot go stale.

python docs/walkthrough.py           write docs/walkthrough.md and its images anew
"""

import contextlib
import io
import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n.*?```\n)?", re.DOTALL)


def rerun(markdown: str, images: Path) -> str:
    """The same text with the output of every python block below it; `images` is where its show() writes."""
    names = {"images": images}

    def execute(block: re.Match) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(block.group(1), names)  # our own file, not input
        output = f"\n```text\n{printed.getvalue()}```\n" if printed.getvalue() else ""
        return f"```python\n{block.group(1)}```\n{output}"

    return BLOCK.sub(execute, markdown)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    source, aside = HERE / "walkthrough.md", HERE / "walkthrough.partial"
    (HERE / "walkthrough").mkdir(exist_ok=True)
    aside.write_text(rerun(source.read_text(encoding="utf-8"), HERE / "walkthrough"), encoding="utf-8")
    os.replace(aside, source)
