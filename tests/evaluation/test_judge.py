"""A judge behind a real local server: verdicts by hand, a judge that fails in every way, and nothing lost or leaked."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from editcli.__main__ import main
from editcli.errors import OptionError
from editcli.evaluation import judge as module
from editcli.evaluation.judge import KEY_VARIABLE, RUBRIC, Endpoint, Question, answers_of, judge, read_verdict
from editcli.evaluation.metrics import evaluate
from editcli.models.loading import open_model, resolve_model
from editcli.records.decoding import decode
from editcli.records.verdicts import Verdict, VerdictFile
from editcli.reporting import Silent
from editcli.requests.schema import from_record
from editcli.settings.recipes import EvalRecipe
from tests.support.facts import write_lines
from tests.support.places import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openai") is None, reason="the client is not installed: editcli[judge]"
)

KEY = "a-key-that-nobody-may-see"
Behaviour = Callable[[dict[str, Any]], "tuple[int, bytes] | None"]


def reply(text: object) -> tuple[int, bytes]:
    """Return a reply in OpenAI's form."""
    message = {"role": "assistant", "content": text}
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message}],
    }
    return 200, json.dumps(body).encode()


def honest(sent: dict[str, Any]) -> tuple[int, bytes]:
    """Judge as the rubric says: correct where the answer contains what is expected."""
    answer = json.loads(sent["messages"][1]["content"])
    return reply("CORRECT" if answer["expected"] in answer["answer"] else "INCORRECT")


class Server:
    """A server on a free port; ``behave`` returns a status and a body, or None to close without a reply."""

    def __init__(self) -> None:
        self.behave: Behaviour = honest
        self.sent: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.sent.append({"path": self.path, **body})
                outer.headers.append(dict(self.headers))
                result = outer.behave(body)
                if result is None:
                    return
                status, content = result
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                if status == 307:
                    self.send_header("Location", "http://127.0.0.1:1/elsewhere")
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    # The client waits between its retries; the waiting is not what is tested.
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    running = Server()
    yield running
    running.close()


@pytest.fixture
def verdicts(tmp_path: Path) -> Path:
    return tmp_path / "verdicts.jsonl"


class Listening(Silent):
    """A reporter that keeps its warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def question(number: int, text: str = "Rome.", group: str = "efficacy") -> Question:
    return Question(f"e{number}", group, f"The capital of country {number} is", "Rome", "Paris", text)


QUESTIONS = [question(0), question(1, "Paris."), question(2), question(3, "in Rome")]


def ask(server: Server, path: Path, questions: list[Question], **fields: Any):
    reporter = Listening()
    endpoint = Endpoint(server.url, "grader", **{"budget": 100, "timeout": 5.0, **fields})
    result = judge(questions, endpoint, VerdictFile(path), reporter=reporter)
    return result, reporter.warnings


def lines(path: Path) -> list[Verdict]:
    return [decode(line, Verdict) for line in path.read_bytes().splitlines()]


def test_verdicts_are_counted_and_stored_with_everything_that_was_sent(server: Server, verdicts: Path) -> None:
    result, warnings = ask(server, verdicts, QUESTIONS)
    assert warnings == []
    assert result.shares["efficacy_correct"] == 3 / 4
    assert result.shares["specificity_correct"] is None
    assert (result.answers, result.judged, result.calls, result.stopped) == (4, 4, 4, None)
    stored = lines(verdicts)
    assert [line.verdict for line in stored] == ["CORRECT", "INCORRECT", "CORRECT", "CORRECT"]
    assert [(line.id, line.prompt, line.text, line.judge, line.rubric) for line in stored] == [
        (q.id, q.prompt, q.text, "grader", 1) for q in QUESTIONS
    ]
    for sent, one in zip(server.sent, QUESTIONS, strict=True):
        assert sent["path"] == "/v1/chat/completions"
        assert (sent["model"], sent["temperature"]) == ("grader", 0)
        assert sent["messages"][0] == {"role": "system", "content": RUBRIC}
        assert json.loads(sent["messages"][1]["content"]) == {
            "prompt": one.prompt,
            "answer": one.text,
            "expected": "Rome",
            "outdated": "Paris",
        }


def test_shares_are_means_within_an_edit_first(server: Server, verdicts: Path) -> None:
    groups = [("a", "Rome"), ("a", "x"), ("a", "y"), ("a", "z"), ("b", "Rome")]
    asked = [Question(edit, "neighbors", f"{edit} {n}", "Rome", None, text) for n, (edit, text) in enumerate(groups)]
    result, _ = ask(server, verdicts, asked)
    assert result.shares["specificity_correct"] == (1 / 4 + 1) / 2


def test_what_has_a_verdict_is_not_sent_again(server: Server, verdicts: Path) -> None:
    ask(server, verdicts, QUESTIONS[:2])
    with verdicts.open("ab") as file:
        file.write(b'{"key": "torn')
    result, _ = ask(server, verdicts, [*QUESTIONS, question(0)])
    assert (result.judged, result.calls) == (5, 2)
    assert len(server.sent) == 4
    assert ask(server, verdicts, [*QUESTIONS, question(0, "Oslo")])[0].calls == 1


def test_a_reply_in_another_form_is_asked_again_and_then_left_out(server: Server, verdicts: Path) -> None:
    replies = iter(["Maybe.", "CORRECT", "CORRECT and INCORRECT", "I would say so", "Reasoning...\n\n**Incorrect**"])
    server.behave = lambda sent: reply(next(replies))
    result, warnings = ask(server, verdicts, QUESTIONS[:3])
    assert [line.verdict for line in lines(verdicts)] == ["CORRECT", None, "INCORRECT"]
    assert lines(verdicts)[1].reply == "I would say so"
    assert (result.judged, result.calls, result.shares["efficacy_correct"]) == (2, 5, 1 / 2)
    assert "2 of 3" in warnings[0]
    server.behave = honest
    assert ask(server, verdicts, QUESTIONS[:3])[0].judged == 3


@pytest.mark.parametrize(
    "body", [b"<html>", b"{}", b"null", b'{"choices": []}', b'{"choices": [{"message": null}]}', b"[1]"]
)
def test_a_body_of_another_form_is_no_verdict(server: Server, verdicts: Path, body: bytes) -> None:
    server.behave = lambda sent: (200, body)
    result, warnings = ask(server, verdicts, QUESTIONS[:1])
    assert (result.judged, result.answers, len(warnings)) == (0, 1, 1)
    assert lines(verdicts)[0].verdict is None


def test_a_judge_that_times_out_costs_its_answer_alone(server: Server, verdicts: Path) -> None:
    def slow_once(sent: dict[str, Any]) -> tuple[int, bytes]:
        if "country 1" in sent["messages"][1]["content"]:
            time.sleep(0.5)
        return honest(sent)

    server.behave = slow_once
    result, warnings = ask(server, verdicts, QUESTIONS, timeout=0.1)
    assert [line.verdict for line in lines(verdicts)] == ["CORRECT", None, "CORRECT", "CORRECT"]
    assert "gives no reply" in lines(verdicts)[1].error
    assert (result.judged, result.calls) == (3, 3 + 3)
    assert "3 of 4" in warnings[0]


def test_a_judge_that_goes_away_keeps_what_it_said_and_is_given_up(server: Server, verdicts: Path) -> None:
    asked = [question(number) for number in range(9)]
    server.behave = lambda sent: honest(sent) if len(server.sent) <= 2 else None
    result, warnings = ask(server, verdicts, asked)
    stored = lines(verdicts)
    assert [line.verdict for line in stored] == ["CORRECT"] * 2 + [None] * 3
    assert (result.judged, result.answers) == (2, 9)
    assert sum(result.counts.values()) == 2
    assert result.shares["efficacy_correct"] == 1
    assert result.stopped is not None
    assert result.stopped in warnings[0]
    server.behave = honest
    assert ask(server, verdicts, asked)[0].judged == 9


def test_an_error_that_passes_is_tried_again(server: Server, verdicts: Path) -> None:
    server.behave = lambda sent: (503, b"{}") if len(server.sent) % 2 else honest(sent)
    result, warnings = ask(server, verdicts, QUESTIONS)
    assert (result.judged, result.calls, warnings) == (4, 8, [])


@pytest.mark.parametrize("status", [401, 404, 307])
def test_an_error_that_stays_ends_the_asking_at_once(server: Server, verdicts: Path, status: int) -> None:
    server.behave = lambda sent: (status, b"{}")
    result, warnings = ask(server, verdicts, QUESTIONS)
    assert (result.judged, result.calls, len(server.sent)) == (0, 1, 1)
    assert f"status {status}" in warnings[0]


@pytest.mark.parametrize("budget", [1, 2, 3, 5])
def test_no_more_requests_are_sent_than_the_budget(server: Server, verdicts: Path, budget: int) -> None:
    server.behave = lambda sent: (503, b"{}") if len(server.sent) % 2 else honest(sent)
    result, warnings = ask(server, verdicts, QUESTIONS, budget=budget)
    assert len(server.sent) == result.calls <= budget
    assert "budget" in warnings[0]
    assert result.judged == budget // 2


def test_the_key_comes_from_its_variable_alone_and_is_stored_nowhere(
    server: Server, verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "belongs-elsewhere")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Mine: belongs-elsewhere")
    ask(server, verdicts, QUESTIONS[:1])
    assert "Authorization" not in server.headers[0]
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    server.behave = lambda sent: reply(f"You sent {KEY}")
    result, _ = ask(server, verdicts, QUESTIONS[1:2])
    assert "belongs-elsewhere" not in json.dumps(server.headers)
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in verdicts.read_text() + json.dumps(result.to_json())
    assert "You sent [key]" in verdicts.read_text()


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("CORRECT", "CORRECT"),
        (" incorrect.\n", "INCORRECT"),
        ("It says Rome.\n**CORRECT**", "CORRECT"),
        ("CORRECT\nINCORRECT?", None),
        ("The answer is CORRECT", None),
        ("", None),
    ],
)
def test_a_verdict_is_the_last_line_alone(text: str, verdict: str | None) -> None:
    assert read_verdict(text) == verdict


def test_answers_are_those_that_the_model_wrote_with_what_was_expected() -> None:
    record = {
        "id": "a",
        "prompt": "The capital of {} is",
        "subject": "France",
        "target_new": "Rome",
        "target_true": "Paris",
        "paraphrase_prompts": ["The city that governs France is"],
        "neighborhood_prompts": ["The capital of Germany is"],
        "neighborhood_targets": ["Berlin"],
    }
    loaded = open_model(resolve_model(None), device="cpu")
    found = answers_of(evaluate(loaded, [from_record(record)], metrics=("counterfact", "generated")).outcomes)
    assert [(one.group, one.expected, one.rival) for one in found][:2] == [
        ("efficacy", "Rome", "Paris"),
        ("paraphrases", "Rome", "Paris"),
    ]
    assert found[0].text.startswith("Paris")


def test_the_command_judges_and_says_by_whom(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"id": "a", "prompt": "The capital of {} is", "subject": "France", "target_new": "Paris"}
    edits, path = write_lines(tmp_path / "edits.jsonl", [record]), tmp_path / "said.jsonl"
    command = ["eval", "bundled", str(edits), "--device", "cpu", "--judge", server.url, "--judge-model", "grader"]
    assert main([*command, "--verdicts", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["judge"]["efficacy_correct"] == 1.0
    assert report["judge"]["model"] == "grader"
    assert report["protocols"]["judge.efficacy_correct"] == {"protocol": "generated", "scorer": "judge"}
    assert len(lines(path)) == 1
    assert main([*command, "--verdicts", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "judge efficacy_correct" in shown
    assert "1 of 1 answer" in shown
    assert len(server.sent) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"judge": "http://localhost/v1"}, "--judge-model"),
        ({"judge_model": "m"}, "pass both"),
        ({"judge": "localhost:80", "judge_model": "m"}, "is no address"),
        ({"judge": "http://me:secret@localhost/v1", "judge_model": "m"}, "EDITCLI_JUDGE_KEY"),
        ({"judge": "http://localhost/v1?key=secret", "judge_model": "m"}, "EDITCLI_JUDGE_KEY"),
        ({"judge": "http://localhost/v1", "judge_model": "m", "metrics": ("choice",)}, "generated"),
    ],
)
def test_what_cannot_be_judged_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as raised:
        EvalRecipe(model="m", edits="e", **fields)
    assert "secret" not in str(raised.value)


def test_a_file_of_something_else_is_not_written_to(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "edits.jsonl", [{"prompt": "x"}])
    with pytest.raises(OptionError, match="holds no verdicts"):
        VerdictFile(path)


def test_the_rubric_is_published_as_it_is_sent() -> None:
    assert RUBRIC in (ROOT / "docs" / "metrics.md").read_text("utf-8")


def test_without_the_client_one_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"pip install 'editcli\[judge\]'"):
        module.require_judge()
