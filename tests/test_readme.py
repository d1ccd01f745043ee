"""Every bash and python block of the README runs, in order, in one empty folder.

A comment right above a block says how: ``<!-- test: max_steps=2 -->`` gives each training command that many steps, and
``<!-- test: skip the reason -->`` leaves the block out, which the test report then shows with the reason.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL)
DIRECTIVE = re.compile(r"<!--\s*test:\s*((?:(?!-->).)*?)\s*-->\s*\Z", re.DOTALL)
TRAINS = re.compile(r"-m (?:stage1_tokenizer\.train|stage2_prior\.train|pipelines\.quickstart)\b")
RUNNABLE = ("bash", "sh", "python")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line that it starts on, and what the comment above it asks for."""

    language: str
    code: str
    line: int
    max_steps: int | None = None
    skip: str | None = None


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks in order. Raises ValueError for a directive that is none, or that stands above no runnable block."""
    found = []
    used = 0
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        language, above = match["language"].strip(), DIRECTIVE.search(text[: match.start()])
        max_steps = skip = None
        if above:
            used += 1
            if language not in RUNNABLE:
                raise ValueError(f"line {line}: the directive {above[1]!r} stands above a {language or 'plain'} block")
            if steps := re.fullmatch(r"max_steps=(\d+)", above[1]):
                max_steps = int(steps[1])
            elif reason := re.fullmatch(r"skip (\S.*)", above[1], re.DOTALL):
                skip = reason[1]
            else:
                raise ValueError(f"line {line}: the directive {above[1]!r} is neither max_steps=N nor skip REASON")
        code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        found.append(Block(language, code, line, max_steps, skip))
    if text.count("```") != 2 * len(found) or len(re.findall(r"<!--\s*test:", text)) != used:
        raise ValueError("a fence does not close, or a directive does not stand right above a block")
    return found


def shortened(code: str, max_steps: int) -> str:
    """Shell commands with ``--max_steps`` after each command that trains."""
    lines = code.replace("\\\n", " ").splitlines()
    if not any(TRAINS.search(line) for line in lines):
        raise ValueError("max_steps is asked for, but nothing trains")
    return "\n".join(_with_steps(line, max_steps) if TRAINS.search(line) else line for line in lines)


def _with_steps(line: str, max_steps: int) -> str:
    command, comment = re.fullmatch(r"(.*?)(\s+#.*)?", line).groups()  # type: ignore[union-attr]
    return f"{command} --max_steps {max_steps}{comment or ''}"


def run_block(block: Block, folder: Path) -> str:
    """Runs the block in ``folder``; its output. Skips with the reason where the README says so; fails with the output."""
    if block.skip is not None:
        pytest.skip(f"line {block.line}: {block.skip}")
    code = block.code if block.max_steps is None else shortened(block.code, block.max_steps)
    shell = [shutil.which("bash") or "sh", "-euc", code]
    command = [sys.executable, "-c", code] if block.language == "python" else shell
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"README line {block.line}, exit code {done.returncode}:\n{code}\n{output[-4000:]}"
    return output


README = [block for block in blocks_of((ROOT / "README.md").read_text(encoding="utf-8")) if block.language in RUNNABLE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One folder for all blocks: the later ones use what the earlier ones made."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("block", README, ids=[f"line{block.line}" for block in README])
def test_a_block_of_the_readme_runs(block, folder):
    run_block(block, folder)


def test_half_of_the_readme_or_more_runs():
    assert README and sum(block.skip is None for block in README) >= len(README) / 2


SAMPLE = """
# Title
```
signals -> codes
```
```bash
echo one > made   # by the first block
```
<!-- test: max_steps=2 -->
```bash
function launch { echo "$@"; }
launch -m stage1_tokenizer.train --config a \\
    --run b   # trains
launch -m pipelines.sample --n 4
```
text
<!-- test: skip it downloads -->
```bash
false
```
- a list
  ```python
  import intarsia
  for line in open("made"):
      print("seen", line)
  ```
```yaml
a: 1
```
"""


def test_the_harness_runs_blocks_in_order_in_one_folder(tmp_path):
    plain, first, trains, skipped, python, yaml = blocks_of(SAMPLE)
    assert (plain.language, yaml.language, python.line) == ("", "yaml", 22)
    run_block(first, tmp_path)
    assert run_block(trains, tmp_path).splitlines() == [
        "-m stage1_tokenizer.train --config a --run b --max_steps 2",
        "-m pipelines.sample --n 4",
    ]
    assert "seen one" in run_block(python, tmp_path)
    with pytest.raises(pytest.skip.Exception, match="it downloads"):
        run_block(skipped, tmp_path)


@pytest.mark.parametrize("code", ["false\ntrue", "echo $no_such_variable", "no-such-command"])
def test_the_harness_fails_where_any_command_of_a_block_fails(tmp_path, code):
    with pytest.raises(AssertionError, match="README line 1, exit code"):
        run_block(blocks_of(f"```bash\n{code}\n```\n")[0], tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "<!-- test: skip -->\n```bash\ntrue\n```\n",
        "<!-- test: max_step=2 -->\n```bash\ntrue\n```\n",
        "<!-- test: skip far away -->\ntext\n```bash\ntrue\n```\n",
        "<!-- test: skip no block -->\n```yaml\na: 1\n```\n",
        "```bash\ntrue\n",
    ],
)
def test_the_harness_skips_nothing_silently(text):
    with pytest.raises(ValueError):
        blocks_of(text)


def test_max_steps_on_a_block_that_trains_nothing_is_a_mistake(tmp_path):
    with pytest.raises(ValueError, match="nothing trains"):
        run_block(Block("bash", "true\n", 1, max_steps=2), tmp_path)
