"""The documentation: its commands run, its generated parts are current, its links lead somewhere, the site builds.

Each page's ``bash`` and ``console`` blocks are run in order, in a folder of the page's own that holds the sample
edits. A block with a title, such as ``json title="facts.jsonl"``, is written to that file when its turn comes. Comments
above a block change what is expected of it: ``<!-- exit 3 -->`` names its exit code, and ``<!-- not run: REASON -->``
leaves it at checking that its commands and options exist.

A ``text`` block after a shell block shows what its commands print: they print its words, where numbers may differ,
lines may break elsewhere and a line ``...`` stands for any lines.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import click
import jsonschema
import pytest

from editcli.__main__ import main
from editcli.cli.app import App
from editcli.cli.main import COMMANDS, build_cli
from editcli.plugin.manager import load_plugins
from tests.support.places import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCHEMAS = ROOT / "editcli" / "schemas"
SHELL = ("bash", "console")
REASON = "not run: "
BLOCK = re.compile(
    r"(?:^[ ]*<!-- (?P<mark>(?:exit|not run)[^\n]*?) -->\n\s*)?^(?P<indent>[ ]*)```(?P<language>\w+)"
    r'(?:[ ]+title="(?P<title>[^"\n]+)")?[^\n]*\n(?P<text>.*?)^(?P=indent)```[ ]*$',
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    language: str
    title: str | None
    mark: str
    text: str

    @property
    def is_run(self) -> bool:
        return self.language in SHELL and not self.mark.startswith(REASON)

    @property
    def exit_code(self) -> int:
        return int(self.mark.removeprefix("exit ")) if self.mark.startswith("exit ") else 0


@dataclass(frozen=True)
class Step:
    """One thing that a reader does: write ``text`` to the file ``title``, or run it where there is no title."""

    text: str
    title: str | None = None
    exit_code: int = 0
    shown: str = ""
    """What the page shows of the output of the block that ends with this step."""


def blocks(page: Path) -> list[Block]:
    found = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        indent = len(match["indent"])
        text = "".join(line[indent:] or "\n" for line in match["text"].splitlines(keepends=True))
        found.append(Block(match["language"], match["title"], match["mark"] or "", text))
    return found


def commands(block: Block) -> Iterator[str]:
    """Yield the commands of a shell block; a line that ends in a backslash goes on, and a here-document is whole."""
    lines = iter(block.text.splitlines())
    for line in lines:
        if block.language == "console":
            if not line.startswith("$ "):
                continue
            line = line[2:]
        while line.endswith("\\"):
            line = line[:-1] + next(lines).removeprefix("> ").lstrip()
        ending = re.search(r"<<'?(\w+)'?", line)
        while ending and not line.endswith(f"\n{ending[1]}"):
            line += "\n" + next(lines)
        if line.strip() and not line.lstrip().startswith("#"):
            yield line


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


RUN = [page for page in PAGES if any(block.is_run for block in blocks(page))]
SHOWN = {line for page in PAGES for block in blocks(page) if block.language in SHELL for line in commands(block)}


def editcli_calls(line: str) -> Iterator[list[str]]:
    """Yield the arguments of every call of editcli in a shell line."""
    for part in re.split(r"&&|\|\||[;|]", line.partition("\n")[0]):
        # A separator within quotes leaves halves of a text, which start with nothing that is a call.
        words = shlex.split(part, comments=True) if re.match(r"\s*(\w+=\S* |time )*editcli\b", part) else []
        while words and words[0] != "editcli":
            words.pop(0)
        if words:
            yield words[1:]


@pytest.mark.parametrize(
    "line", sorted(line for line in SHOWN if any(True for _ in editcli_calls(line))), ids=lambda line: line[:60]
)
def test_a_command_that_is_shown_is_one(line: str) -> None:
    plugins = load_plugins()
    group = build_cli(plugins)
    for words in editcli_calls(line):
        command: click.Command = group
        context = click.Context(group, obj=App(plugins), **group.context_settings)
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            found = command.get_command(context, words[0])
            assert found is not None or command is not group, f"there is no command {words[0]}"
            if found is None:
                break
            command, words = found, words[1:]
            context = click.Context(command, parent=context, obj=App(plugins))
        command.make_parser(context).parse_args(list(words))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for what pages share: the cache, and what the first command of several of them leaves."""
    return tmp_path_factory.mktemp("docs")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_the_commands_of_a_page_run(page: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared / "cache"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    # Fewer prefixes and pilots, since most of the time would go there; commands and files are those that are shown.
    monkeypatch.setenv("EDITCLI_OPTIONS", "nas.pilots=20 targets.prefixes=1")
    monkeypatch.setenv("COLUMNS", "80")
    todo = list(steps(page))
    opening = 1 + next(number for number, step in enumerate(todo) if step.title is None)
    begun = shared / hashlib.sha256(repr(todo[:opening]).encode()).hexdigest()
    # A run that several pages begin with names the edits file of the first page, so that folder has to stay.
    folder = shared / name_of(page).replace("/", "-")
    if begun.exists():
        shutil.copytree(begun, folder)
    else:
        shutil.copytree(ROOT / "sample_edits", folder / "sample_edits")
    monkeypatch.chdir(folder)
    said = begun.with_suffix(".txt")
    if not begun.exists():
        said.write_text(perform(todo[:opening], page), encoding="utf-8")
        shutil.copytree(folder, begun)
    perform(todo[opening:], page, said.read_text("utf-8"))
    check_records(folder)


def steps(page: Path) -> Iterator[Step]:
    """Yield what a reader of the page does: write files and run commands, in order."""
    listed = blocks(page)
    for block, following in itertools.zip_longest(listed, listed[1:]):
        if block.title and not block.mark.startswith(REASON):
            yield Step(block.text, title=block.title)
        elif block.is_run:
            *earlier, last = [line for line in commands(block) if not line.startswith("pip install '.[test]'")] or [":"]
            shown = following.text if following is not None and following.language == "text" else ""
            yield from (Step(line) for line in earlier)
            yield Step(last, exit_code=block.exit_code, shown="" if shown.startswith("Usage: ") else shown)


def perform(todo: list[Step], page: Path, output: str = "") -> str:
    """Do the steps; return ``output``, what earlier ones printed, with what these print."""
    for step in todo:
        if step.title is not None:
            Path(step.title).write_text(step.text, encoding="utf-8")
            continue
        code, said = execute(step.text.removeprefix("pip install . && "))
        assert code == step.exit_code, f"{name_of(page)}: {step.text!r} gave {code}: {said[-2000:]}"
        output += said
        if step.shown:
            missing = missing_part(step.shown, output)
            assert missing is None, (
                f"{name_of(page)} shows after {step.text!r} what is not printed:\n{missing}\n\n{output}"
            )
    return output


def missing_part(shown: str, printed: str) -> str | None:
    """Return the first part of ``shown`` that ``printed`` does not have in its place; None when it has them all.

    The lines ``...`` part a text; where lines break and how wide columns are does not matter.
    """
    rest = masked(printed)
    for part in filter(None, map(masked, re.split(r"^\s*\.\.\.\s*$", shown, flags=re.MULTILINE))):
        _, here, rest = rest.partition(part)
        if not here:
            return part
    return None


def masked(text: str) -> str:
    """Return the words of a text with numbers, hashes, curves and rules left out."""
    text = re.sub(r"\b(?=[0-9a-f]*\d)[0-9a-f]{12,}\b", "#", text)
    text = re.sub(r"[-+]?\d[\d,.]*(e[-+]?\d+)?", "#", text)
    text = re.sub(r"[\u2581-\u2588]+", "~", text)
    return " ".join(text.replace("\u2500", " ").split())


def test_a_shown_part_that_is_not_printed_is_named() -> None:
    printed = "3 of 3 edits applied\n R_n  drift\n 1.02  0.1\ndone\n"
    assert missing_part("2 of 2 edits applied\n...\n 1.5 0.25\n", printed) is None
    assert missing_part("3 of 3 edits\napplied R_n drift\n", printed) is None
    assert missing_part("3 of 3 edits applied\n drift  R_n\n", printed) == "# of # edits applied drift R_n"
    assert missing_part("done\n...\n3 of 3 edits applied\n", printed) == "# of # edits applied"


def check_records(folder: Path) -> None:
    """Hold what runs wrote against the schemas that the pages describe."""
    run, journal = (
        jsonschema.Draft202012Validator(json.loads((SCHEMAS / f"{name}.schema.json").read_text("utf-8")))
        for name in ("run", "journal")
    )
    for path in folder.glob("*/editcli/run.json"):
        run.validate(json.loads(path.read_text("utf-8")))
    for path in folder.glob("*/editcli/journal.jsonl"):
        for line in path.read_text("utf-8").splitlines():
            journal.validate(json.loads(line))


def execute(line: str) -> tuple[int, str]:
    """Run one shell line; a plain call of editcli runs in this process, which spares importing torch again."""
    words = shlex.split(line, comments=True) if "\n" not in line else []
    settings = dict(word.split("=", 1) for word in itertools.takewhile(re.compile(r"[A-Z_]+=").match, words))
    words = words[len(settings) :]
    if words[:1] == ["editcli"] and not set(words) & {"|", "&&", ";", ">", "<", "||"}:
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said), mock.patch.dict(os.environ, settings):
            return main(words[1:]), said.getvalue()
    finished = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    return finished.returncode, finished.stdout + finished.stderr


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_that_is_not_run_says_why_in_words(page: Path) -> None:
    for block in blocks(page):
        if block.mark.startswith("not run"):
            assert len(block.mark.removeprefix(REASON).split()) >= 3, block.mark


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_link_to_a_file_leads_to_one(page: Path) -> None:
    text = re.sub(r"^([ ]*)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{name_of(page)} links {target}, which is not there"


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["docs_commands", "docs_reference", "schemas"])
def test_what_is_generated_is_current(tool: str) -> None:
    # In a process of its own, because click keeps what an earlier test asked of a command.
    check = [sys.executable, "-m", f"tools.{tool}", "--check"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"run: python -m tools.{tool}\n{done.stderr}"


def test_every_command_has_a_page() -> None:
    found = {path.stem for path in (ROOT / "docs" / "commands").glob("*.md")}
    assert found == {"index", *COMMANDS}


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r"([\w/-]+\.md)", navigation))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if "docs" in page.parts}


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    fetched = [
        (path.name, url)
        for path in tmp_path.rglob("*.html")
        for url in re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?://[^"]+)"', path.read_text("utf-8"))
    ]
    assert not fetched, "a page fetches something from elsewhere"
    assert "<math" in (tmp_path / "methods.html").read_text("utf-8")
