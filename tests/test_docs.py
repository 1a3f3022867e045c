"""The documentation: its commands run, its generated parts are current, its links lead somewhere, the site builds.

Each page's ``bash`` and ``console`` blocks are run in order, in a folder of the page's own that holds the sample edits.
A block with a title, such as ``json title="facts.jsonl"``, is written to that file when its turn comes. A comment above a
block changes what is expected of it: ``<!-- exit 3 -->`` names its exit code, and ``<!-- not run: REASON -->`` leaves it
at checking that its commands and options exist.
"""

from __future__ import annotations

import io
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

import click
import pytest

from editcli.__main__ import main
from editcli.cli import COMMANDS, build_cli
from editcli.cli.common import App
from editcli.plugins import load_plugins

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
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
SHOWN = [
    (page, line) for page in PAGES for block in blocks(page) if block.language in SHELL for line in commands(block)
]


def editcli_calls(line: str) -> Iterator[list[str]]:
    """Yield the arguments of every call of editcli in a shell line."""
    for part in re.split(r"&&|\|\||[;|]", line.partition("\n")[0].replace("'|'", "")):
        if "editcli" in part.split("'")[0]:
            words = [word for word in shlex.split(part, comments=True) if word != "time"]
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words and words[0] == "editcli":
                yield words[1:]


@pytest.mark.parametrize(
    "line", sorted({line for _, line in SHOWN if any(True for _ in editcli_calls(line))}), ids=lambda line: line[:60]
)
def test_a_command_that_is_shown_is_one(line: str) -> None:
    plugins = load_plugins()
    group = build_cli(plugins)
    for words in editcli_calls(line):
        command: click.Command = group
        context = click.Context(group, obj=App(plugins))
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            found = command.get_command(context, words[0])
            assert found is not None or command is not group, f"there is no command {words[0]}"
            if found is None:
                break
            command, words = found, words[1:]
            context = click.Context(command, parent=context, obj=App(plugins))
        command.make_parser(context).parse_args(list(words))


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("docs-cache")


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_the_commands_of_a_page_run(
    page: Path, tmp_path: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "sample_edits", tmp_path / "sample_edits")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared_cache))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    # The anchor of nas is measured on a thousand facts, which takes longer than everything else on these pages.
    monkeypatch.setenv("EDITCLI_OPTIONS", "nas.pilots=20")
    for block in blocks(page):
        if block.title and not block.mark.startswith(REASON):
            (tmp_path / block.title).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
        elif block.is_run:
            lines = [line for line in commands(block) if not line.startswith("pip install '.[test]'")]
            for number, line in enumerate(lines, start=1):
                expected = block.exit_code if number == len(lines) else 0
                code, said = execute(line.removeprefix("pip install . && "))
                assert code == expected, f"{name_of(page)}: {line!r} gave {code}, not {expected}: {said[-2000:]}"


def execute(line: str) -> tuple[int, str]:
    """Run one shell line; a plain call of editcli runs in this process, which spares importing torch again."""
    words = shlex.split(line, comments=True) if "\n" not in line else []
    if words[:1] == ["editcli"] and not set(words) & {"|", "&&", ";", ">", "<", "||"}:
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            return main(words[1:]), said.getvalue()
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


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


def test_every_command_has_a_page_with_its_help() -> None:
    from tools.docs_commands import FOLDER, pages

    expected = pages()
    assert {FOLDER / f"{name}.md" for name in COMMANDS} | {FOLDER / "index.md"} == set(expected)
    for path, text in expected.items():
        assert path.read_text(encoding="utf-8") == text, "run: python -m tools.docs_commands"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r"([\w/-]+\.md)", navigation))
    assert listed == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if "docs" in page.parts}


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
