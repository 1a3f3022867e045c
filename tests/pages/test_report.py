"""The page of a run: self-contained, escaped, small; and in a real browser it loads, searches and shows its curves."""

from __future__ import annotations

import functools
import html.parser
import http.client
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from editcli.cli.app import App
from editcli.cli.main import build_cli
from editcli.errors import OptionError, StateError
from editcli.plugin.manager import Plugins
from editcli.records.evidence import write_evidence
from editcli.records.state import RunFolder
from editcli.requests.schema import from_record

pytest.importorskip("matplotlib", reason="the page needs editcli[report]")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed (Debian: chromium, chromium-driver)"
)
HOSTILE = "<script>alert(1)</script>"
VOID = {"col", "meta", "link", "input", "br", "hr", "img"}


def report(run: Path, target: Path, *more: str):
    app = App(Plugins())
    arguments = ["report", str(run), "--out", str(target), *more]
    return CliRunner().invoke(build_cli(app.plugins), arguments, obj=app, standalone_mode=False)


def page_of(run: Path, target: Path, *more: str) -> str:
    result = report(run, target, *more)
    assert result.exit_code == 0, result.exception
    return target.read_text("utf-8")


def people(count: int) -> list[Any]:
    """Return edits with everything that a page may choke on in the first of them."""
    records = [
        {
            "id": f"p{i}",
            "prompt": "{} works in",
            "subject": f"Ada Lovelace {i}",
            "target_new": f"Town {i}",
            "target_true": "Rome",
        }
        for i in range(count)
    ]
    records[0] |= {"subject": HOSTILE, "target_new": '"><img src=x onerror=alert(2)>', "id": "'\"&<b>"}
    return [from_record(record) for record in records]


class Balance(html.parser.HTMLParser):
    """Check that tags are closed in order, and collect what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_tells_everything_and_fetches_nothing(make_run, tmp_path):
    page = page_of(make_run(), tmp_path / "page.html")
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert [text for text in parser.fetched if not text.startswith(("data:", "#"))] == []
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    for text in ("R_n per site", "Drift per site", "Efficacy", "Time per batch", "Singular values, layer 1", "Town 5"):
        assert text in page
    for text in ("memit + nas", "a" * 64, "f" * 64, "editcli apply facts.jsonl", "0.875", "inferred"):
        assert text in page


@pytest.mark.slow
def test_values_are_escaped_everywhere(make_run, tmp_path):
    run = make_run(people(4))
    record = json.loads((run / "editcli" / "run.json").read_text())
    record |= {"model": HOSTILE, "editor": HOSTILE, "stabilizers": [HOSTILE], "verdict": HOSTILE}
    record["provenance"]["device"] = HOSTILE
    record["provenance"]["versions"] = {HOSTILE: HOSTILE}
    (run / "editcli" / "run.json").write_text(json.dumps(record))
    (run / "editcli" / "rejected.jsonl").write_text(json.dumps({"id": HOSTILE, "line": 3, "reason": HOSTILE}) + "\n")
    page = page_of(run, tmp_path / "page.html")
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; works in" in page
    parser = Balance()
    parser.feed(page)
    assert parser.seen.count("script") == 1
    assert "img" not in parser.seen


def test_outcomes(make_run, tmp_path):
    from editcli.records.edits import edit_rows
    from editcli.records.history import read_history

    run = make_run(batch=3)
    answers = [{"exact": True, "success": True}, {"exact": False, "success": True}, {"exact": False, "success": False}]
    lines = [
        {"id": f"e{i}", "efficacy": [answer], "paraphrases": [answers[0], answer]} for i, answer in enumerate(answers)
    ]
    (run / "editcli" / "outcomes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{torn")
    (run / "editcli" / "rejected.jsonl").write_text(
        '{"id": "e4", "line": 5, "reason": "its value was too long", "file": null}\n'
        '{"id": "e0", "line": 9, "reason": "id used before", "file": "facts.jsonl"}\n'
        '{"id": null, "line": 12, "reason": "bad JSON", "file": "facts.jsonl"}\n'
    )
    found = list(edit_rows(read_history(run)))
    assert [row.id for row in found] == ["e0", "e1", "e2", "e3", "e4", "e5", "e0", ""]
    words = [row.outcome for row in found]
    assert words == ["answered", "likelier", "missed", "written", "rejected", "written", "rejected", "rejected"]
    rows = {row.id: row for row in found[:6]}
    assert rows["e1"].note == "1/2 paraphrases answered"
    assert rows["e4"].note == "its value was too long"
    assert [row.note for row in found[6:]] == ["facts.jsonl:9: id used before", "facts.jsonl:12: bad JSON"]
    assert (rows["e5"].prompt, rows["e5"].true, rows["e5"].step) == ("Person 5 lives in", "Rome", 2)
    page = page_of(run, tmp_path / "page.html")
    assert "answered (1)" in page
    assert "rejected (3)" in page


def free(group: str, prompt: str, text: str, **scores: bool) -> dict[str, Any]:
    known = {"exact": False, "right": False, "rival": False, "degenerate": False}
    return {"group": group, "prompt": prompt, "text": text, **known, **scores}


def keep_evidence(run: Path, count: int = 6) -> RunFolder:
    """Keep an evaluation in a run, as eval --record does."""
    figures = {
        "edits_file": "facts.jsonl",
        "edits": count,
        "efficacy_accuracy": 0.875,
        "generated": {"efficacy_contains_new": 0.38461},
        "base": {"model": "the base", "efficacy_accuracy": 0.0, "generated": {"efficacy_contains_new": 0.0}},
        "in_context": None,
        "distribution": {
            "neighbors": {
                "prompts": 6,
                "median": 0.25,
                "p90": 1.5,
                "worst": [{"edit": "e4", "prompt": "x", "kl": 2.75}],
            },
            "unrelated": None,
        },
        "quantised": [{"as": "nf4", "efficacy_accuracy": 0.6789, "generated": {"efficacy_contains_new": 0.1234}}],
        "cohorts": [{"first": 1, "last": 6, "edits": 5, "efficacy_accuracy": 0.4321, "generated": {}}],
        "judge": {"model": "the judge", "url": "http://x", "rubric": 1, "judged": 4, "answers": 12},
        "harness": {"tasks": {"arc": {"acc": 0.2468}}},
        "protocol_settings": {"prompts": "bare", "generated": {"most_new_tokens": 32, "stop": ["newline"]}},
    }
    lines = []
    for n in range(count):
        prompt, near = f"Person {n} lives in", f"Neighbour {n} lives in"
        mine = [
            free("efficacy", prompt, f"Town {n}.", right=True),
            free("neighbors", near, "no no no", degenerate=True),
        ]
        theirs = [free("efficacy", prompt, "Rome.", rival=True), free("neighbors", near, "Rome")]
        lines.append({"id": f"e{n}", "generated": mine, "base": {"generated": theirs}})
    lines[0]["generated"][0]["text"] = HOSTILE
    folder = RunFolder(run)
    write_evidence(folder, figures, lines)
    return folder


def test_evidence_names_protocols_baselines_answers_and_what_is_missing(make_run, tmp_path):
    run = make_run()
    keep_evidence(run)
    page = page_of(run, tmp_path / "page.html")
    assert HOSTILE not in page
    for text in ("<h3>teacher_forced</h3>", "<h3>generated</h3>", "0.3846", "most_new_tokens 32", "the base"):
        assert text in page
    assert '<tr><td>e4</td><td>x</td><td class="n">2.75</td></tr>' in page
    # Everything that was measured is shown: copies, ages, benchmarks, and who judged.
    for text in ("as nf4", "0.6789", "1 to 6", "0.4321", "0.2468", "the judge at http://x", "4 of 12 answers"):
        assert text in page
    missing = page[page.index('id="missing"') : page.index("Raw answers")]
    for text in ("in-context", "--metrics choice", "no portability or locality"):
        assert text in missing
    for text in ("--metrics generated", "--harness", "--as", "--judge", "age of the edits"):
        assert text not in missing
    rows = page[page.index('<table id="answers">') :].split("</table>")[0]
    assert rows.count('data-outcome="right"') == rows.count('data-outcome="degenerate"') == 6
    assert "<td>Rome.</td><td>Town 3.</td><td>right</td>" in rows
    # The text that the edited model writes stands beside the edit as well.
    assert "<td>Town 3.</td></tr>" in page[page.index('<table id="edits">') :]


def test_evidence_of_another_state_of_the_run_is_named(make_run, tmp_path):
    run = make_run()
    folder = keep_evidence(run)
    assert "The run has changed" not in page_of(run, tmp_path / "page.html")
    record = json.loads(folder.record.read_text())
    record["provenance"]["consumed"] = "0" * 64
    folder.record.write_text(json.dumps(record))
    assert "The run has changed" in page_of(run, tmp_path / "page.html")


def test_a_run_without_evidence_says_so_and_damaged_evidence_is_none(make_run, tmp_path):
    run = make_run()
    page = page_of(run, tmp_path / "page.html")
    assert "anything beyond the figures of the run itself" in page
    folder = keep_evidence(run)
    for text in ("{torn", "[]", '{"figures": 3, "measured": "now"}'):
        folder.evaluation.write_text(text)
        assert page_of(run, tmp_path / "page.html") == page
    folder.evaluation.unlink()
    folder.answers.write_text("{torn")
    assert page_of(run, tmp_path / "page.html") == page


def test_a_run_that_just_began_has_a_page(make_run, tmp_path):
    run = make_run()
    shutil.rmtree(run / "editcli" / "updates")
    (run / "editcli" / "journal.jsonl").unlink()
    (run / "editcli" / "run.json").write_text('{"status": "running"}')
    assert "No verdict" in page_of(run, tmp_path / "page.html")


def test_a_model_is_no_run(base, tmp_path):
    result = report(base, tmp_path / "page.html")
    assert isinstance(result.exception, StateError)
    assert str(base) in str(result.exception)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.slow
def test_only_pages_are_written_over(make_run, tmp_path):
    run, target = make_run(), tmp_path / "page.html"
    page_of(run, target, "--no-spectra")
    page_of(run, target, "--no-spectra")
    target.write_text("my notes")
    result = report(run, target)
    assert isinstance(result.exception, OptionError)
    assert target.read_text() == "my notes"


@pytest.mark.parametrize(("module", "name"), [("matplotlib", "matplotlib"), ("jinja2", "jinja2")])
def test_a_missing_extra_is_one_sentence(make_run, tmp_path, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    result = report(make_run(), tmp_path / "page.html")
    assert isinstance(result.exception, OptionError)
    assert name in str(result.exception)
    assert "pip install 'editcli[report]'" in str(result.exception)


@pytest.mark.slow
def test_the_same_run_gives_the_same_page(make_run, tmp_path):
    run = make_run()
    assert page_of(run, tmp_path / "a.html") == page_of(run, tmp_path / "b.html")


class Browser:
    """Headless Chromium through the W3C WebDriver protocol, which takes a few lines and no dependency."""

    def __init__(self, profile: Path):
        self._process = subprocess.Popen(
            [str(DRIVER), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._port = self._read_port()
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
        ]
        options = {"binary": CHROMIUM, "args": flags}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self._session = ""
        self._session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]

    def _read_port(self) -> int:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            found = re.search(r"started successfully on port (\d+)", line)
            if found:
                return int(found.group(1))
        raise RuntimeError("chromedriver did not start")

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        try:
            target = path if path == "/session" else f"/session/{self._session}{path}"
            data = None if body is None else json.dumps(body)
            connection.request(method, target, data, {"Content-Type": "application/json"})
            value = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        if isinstance(value, dict) and "error" in value:
            raise RuntimeError(f"{value['error']}: {value['message']}")
        return value

    def open(self, page: Path) -> None:
        self.call("POST", "/url", {"url": page.as_uri()})

    def run(self, script: str) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def log(self, kind: str) -> list[dict[str, Any]]:
        return self.call("POST", "/se/log", {"type": kind})

    def close(self) -> None:
        try:
            self.call("DELETE", "")
        finally:
            self._process.terminate()
            self._process.communicate(timeout=30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


def requested(browser: Browser) -> list[str]:
    """Return the addresses that the browser asked for since the log was last read."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    found = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    # The browser's own first tab is still loading its parts while the page opens; no page can ask for those.
    return [url for url in found if not url.startswith("chrome://")]


def complaints(browser: Browser) -> list[str]:
    return [entry["message"] for entry in browser.log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def wait_for(browser: Browser, script: str, wanted: Any) -> None:
    found = functools.partial(browser.run, script)
    deadline = time.monotonic() + 20
    while found() != wanted:
        assert time.monotonic() < deadline, (script, found())
        time.sleep(0.05)


SHOWN = "return Array.from(document.querySelectorAll('#edits tbody tr')).filter(r => r.offsetParent !== null).length"


def search(browser: Browser, text: str) -> None:
    browser.run(
        "var box = document.getElementById('search');"
        f"box.value = {json.dumps(text)}; box.dispatchEvent(new Event('input'));"
    )


@needs_browser
def test_the_page_in_a_browser(make_run, tmp_path, browser):
    target = tmp_path / "page.html"
    page_of(make_run(people(12), batch=3), target)
    requested(browser), complaints(browser)
    browser.open(target)
    assert complaints(browser) == []
    assert [url for url in requested(browser) if not url.startswith(("file:", "data:"))] == []
    curves = (
        "return Array.from(document.querySelectorAll('#curves svg')).map(s => s.getBoundingClientRect().height > 100)"
    )
    drawn = browser.run(curves)
    assert len(drawn) >= 4
    assert all(drawn)
    assert browser.run("return document.querySelectorAll('#spectra svg').length") >= 2
    assert browser.run("return document.querySelectorAll('#edits td')[1].textContent") == f"{HOSTILE} works in"
    assert browser.run("return document.scripts.length") == 1


@needs_browser
def test_search_finds_edits(make_run, tmp_path, browser):
    target = tmp_path / "page.html"
    page_of(make_run(people(12), batch=3), target)
    browser.open(target)
    assert browser.run(SHOWN) == 12
    for text, count in (("lovelace 7", 1), ("TOWN", 11), ("<script>", 1), ("nothing like it", 0), ("", 12)):
        search(browser, text)
        wait_for(browser, SHOWN, count)
        wait_for(browser, "return document.getElementById('count').textContent", f"{count} of 12")


@needs_browser
def test_search_finds_answers_and_leaves_the_edits_alone(make_run, tmp_path, browser):
    run, target = make_run(), tmp_path / "page.html"
    keep_evidence(run)
    page_of(run, target, "--no-spectra")
    complaints(browser)
    browser.open(target)
    assert complaints(browser) == []
    shown = SHOWN.replace("#edits", "#answers")
    assert browser.run(shown) == 12
    find = "var box = document.getElementById('find'); box.value = {}; box.dispatchEvent(new Event('input'));"
    for text, count in (
        ("town 3", 1),
        ("neighbour", 6),
        ("rome", 12),
        ("<script>", 1),
        ("nothing like it", 0),
        ("", 12),
    ):
        browser.run(find.format(json.dumps(text)))
        wait_for(browser, shown, count)
    pick = "var box = document.getElementById('verdict'); box.value = 'degenerate';"
    browser.run(f"{pick} box.dispatchEvent(new Event('change'));")
    wait_for(browser, shown, 6)
    assert browser.run(SHOWN) == 6
    assert browser.run("return document.querySelector('#evidence output').textContent") == "6 of 12"
    browser.devtools("Emulation.setDeviceMetricsOverride", width=360, height=800, deviceScaleFactor=1, mobile=True)
    browser.open(target)
    assert browser.run("return document.documentElement.scrollWidth") <= 360
    browser.devtools("Emulation.clearDeviceMetricsOverride")


@needs_browser
@pytest.mark.parametrize(
    ("theme", "width"),
    [
        ("light", 360),
        ("dark", 1280),
        pytest.param("light", 1280, marks=pytest.mark.slow),
        pytest.param("dark", 360, marks=pytest.mark.slow),
    ],
)
def test_the_page_fits_and_follows_the_theme(make_run, tmp_path, browser, width, theme):
    target = tmp_path / "page.html"
    page_of(make_run(people(12), batch=3), target)
    browser.devtools(
        "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500
    )
    browser.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
    browser.open(target)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    paper = browser.run("return getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", paper)[:3])) / 3
    assert (brightness > 128) == (theme == "light")
    ink = browser.run("return getComputedStyle(document.querySelector('#curves svg text')).fill")
    assert ink == browser.run("return getComputedStyle(document.body).color")


@needs_browser
def test_print_is_black_on_white_without_controls(make_run, tmp_path, browser):
    target = tmp_path / "page.html"
    page_of(make_run(people(4)), target, "--no-spectra")
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.devtools("Emulation.setEmulatedMedia", media="print", features=dark)
    browser.open(target)
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("return getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert browser.run("return document.getElementById('search').offsetParent") is None
    browser.devtools("Emulation.setEmulatedMedia", media="", features=[])


@pytest.mark.slow
@needs_browser
def test_two_thousand_edits_are_light_and_quick(make_run, tmp_path, browser):
    target = tmp_path / "page.html"
    page_of(make_run(people(2000), batch=10, scale=0.01), target)
    assert target.stat().st_size < 3_000_000
    browser.devtools("Emulation.clearDeviceMetricsOverride")
    browser.open(target)
    timing = "var t = performance.getEntriesByType('navigation')[0]; return t.loadEventEnd - t.startTime"
    assert browser.run(timing) < 2000
    assert browser.run(SHOWN) == 2000
    search(browser, "town 1234")
    wait_for(browser, SHOWN, 1)
