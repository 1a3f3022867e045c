"""No source evaluates text, starts programs or unpickles, and a condition is never code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editcli.errors import OptionError
from editcli.settings.guards import BATCH_FIGURES, SITE_FIGURES, Guard, parse_guards
from tests.support.places import ROOT

FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "ctypes", "pty", "code", "codeop", "yaml"}
FORBIDDEN_CALLS = {
    *("os.system", "os.popen", "os.startfile", "torch.load", "torch.hub.load", "numpy.load", "np.load"),
    *("tempfile.mktemp", "shutil.unpack_archive", "zipfile.ZipFile", "tarfile.open"),
}
# Telling glibc what to do with freed memory has no other door; it loads the library that the process already runs on.
# A contract test asks a fresh interpreter what the import of a plugin author's module loads.
# Where the user asks for it, pickles are read as tensors alone, which a test of its own holds.
ALLOWED = {
    "editcli/heap.py": ["ctypes"],
    "editcli/testing/listing.py": ["subprocess", "subprocess.run"],
    "editcli/storage/pickles.py": ["pickle", "torch.load", "torch.load"],
}
SHELLS = ("subprocess.", "os.exec", "os.spawn", "asyncio.create_subprocess")


def sources() -> list[Path]:
    return sorted(path for folder in ("editcli", "plugins") for path in (ROOT / folder).rglob("*.py"))


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def dangers(tree: ast.AST) -> Iterator[str]:
    """Yield what would run text as code, start a program, or unpickle."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.partition(".")[0] in {*FORBIDDEN_MODULES, "subprocess"})
        elif isinstance(node, ast.ImportFrom):
            root = (node.module or "").partition(".")[0]
            yield from [root] if root in {*FORBIDDEN_MODULES, "subprocess"} else []
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in FORBIDDEN_NAMES | FORBIDDEN_CALLS or name.startswith(SHELLS):
                yield name
            yield from (f"{name}(shell=...)" for keyword in node.keywords if keyword.arg == "shell")


BARE = {"open", "safe_open", "load_file"}
READERS = {*BARE, "read_text", "read_bytes", "fdopen"}
OPENER = "editcli/storage/opening.py"
# What is not the opener's: files of the package itself and of the kernel, folders to sync or lock, files to write, and
# safetensors files whose headers the opener has read.
OPENED_ELSEWHERE = {
    "editcli/__main__.py": {"os.open"},
    "editcli/models/memory.py": {"_SELF.read_text", ".read_text"},
    "editcli/pages/page.py": {".read_text"},
    "editcli/presets/loader.py": {"file.read_text"},
    "editcli/records/state.py": {"self.journal.open"},
    "editcli/lazy.py": {"stub.read_text"},
    "editcli/plugin/stacks.py": {"file.read_text"},
    "editcli/records/verdicts.py": {"self.path.open"},
    "editcli/runs/opening.py": {"job.open"},
    "editcli/scaffold/package.py": {".read_text", "file.open"},
    "editcli/storage/checkpoint.py": {"safe_open"},
    "editcli/storage/files.py": {"os.open", "os.fdopen"},
    "editcli/storage/folders.py": {"os.open"},
    "editcli/tuning/probes.py": {".read_text"},
    "editcli/tuning/study.py": {"file.open"},
}


def openings(tree: ast.AST) -> Iterator[str]:
    """Yield what opens a file without the opener; its own functions are called by their bare names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in BARE or (isinstance(node.func, ast.Attribute) and node.func.attr in READERS):
                yield name


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_opens_a_file_but_by_the_opener(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    if name != OPENER:
        assert set(openings(ast.parse(path.read_text(encoding="utf-8")))) == OPENED_ELSEWHERE.get(name, set())


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_evaluates_text_starts_programs_or_unpickles(path: Path) -> None:
    allowed = ALLOWED.get(path.relative_to(ROOT).as_posix(), [])
    assert list(dangers(ast.parse(path.read_text(encoding="utf-8")))) == allowed


def test_pickles_are_read_as_tensors_alone() -> None:
    tree = ast.parse((ROOT / "editcli" / "storage" / "pickles.py").read_text("utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and dotted(node.func) == "torch.load"]
    assert len(calls) == 2
    for call in calls:
        assert {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}["weights_only"] == "True"


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "import pickle",
        "from subprocess import run",
        "os.system('ls')",
        "torch.load(path, weights_only=True)",
        "run('ls', shell=True)",
        "__import__('os')",
    ],
)
def test_the_search_finds_what_it_looks_for(text: str) -> None:
    assert list(dangers(ast.parse(text)))


# The language of --stop-if.

conditions = st.one_of(
    st.text(max_size=40),
    st.from_regex(r"\A\s*[a-z_]{1,12}\s*[<>=!]{0,3}\s*[-+.\deEinfa_]{0,12}\s*\Z"),
    st.builds(
        "{}{}{}".format, st.sampled_from([*SITE_FIGURES, *BATCH_FIGURES]), st.sampled_from("<>="), st.floats().map(str)
    ),
)


@given(conditions)
def test_a_condition_is_parsed_or_refused(text: str) -> None:
    try:
        guards = parse_guards([text])
    except OptionError:
        return
    for guard in guards:
        assert guard.figure in (*SITE_FIGURES, *BATCH_FIGURES)
        assert abs(guard.limit) < float("inf")
        assert parse_guards([f"{guard.figure}{guard.relation}{guard.limit!r}"]) == (guard,)


@pytest.mark.parametrize(
    "text", ["__import__('os').system('id')", "ratio>2 or 1", "ratio>0x10", "ratio>1_000", "ratio>\u0661", "ratio>2;x"]
)
def test_code_is_no_condition(text: str) -> None:
    with pytest.raises(OptionError):
        parse_guards([text])
    assert parse_guards(["ratio>2.5"]) == (Guard("ratio", ">", 2.5),)
