"""Chat templates as models bring them: they trim, refuse, come in several, read the clock, and open thoughts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import editcli
from editcli.__main__ import main
from editcli.errors import ModelError, OptionError, RequestError, StateError
from editcli.evaluation.admission import thinking_warning
from editcli.models.chat_settings import ChatSettings, parse_arguments
from editcli.models.tokens import Tokens
from editcli.requests.schema import EditRequest, from_record
from editcli.runs.card import command_line
from editcli.settings.recipe import Recipe
from editcli.testing import CHAT_TEMPLATE, tiny_model_folder, tiny_tokenizer
from tests.support.facts import write_lines

TRIMS = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
UPPER = CHAT_TEMPLATE.replace("message['content']", "message['content'] | replace('capital', 'CAPITAL')")
STRICT = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHAT_TEMPLATE
DATED = "{{ strftime_now('%d %B %Y %H:%M:%S.%f') }}\n" + CHAT_TEMPLATE
THINKS = CHAT_TEMPLATE + "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
THOUGHT = CHAT_TEMPLATE + "<think>\n\n</think>\n\n"

QUICK: Mapping[str, Any] = {
    "editor": "ft",
    "settings": {"ft": {"steps": 1}},
    "layers": "1",
    "device": "cpu",
    "chat_template": True,
}


def request(prompt: str = "The capital of {} is", subject: str = "France") -> EditRequest:
    return from_record({"prompt": prompt, "subject": subject, "target_new": "Rome"}, file="facts.jsonl", line=7)


def tokens(template: Any, **settings: Any) -> Tokens:
    return Tokens(tiny_tokenizer(chat_template=template), chat_template=ChatSettings(**settings))


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    def make(template: str) -> Path:
        return tiny_model_folder(tmp_path / "model", tokenizer=tiny_tokenizer(chat_template=template))

    return make


@pytest.mark.parametrize(
    ("template", "prompt", "rendered"),
    [
        (TRIMS, " The capital of {} is ", "[user] The capital of France is\n"),
        (TRIMS, "{} ", "[user] France\n"),
        (UPPER, "The capital of {} is", "[user] The CAPITAL of France is\n"),
    ],
)
def test_a_subject_is_found_in_what_the_template_makes_of_its_prompt(template: str, prompt: str, rendered: str) -> None:
    found = tokens(template).locate(request(prompt), "Rome")
    assert found.text == f"{rendered}[assistant] Rome"
    assert found.subject is not None
    assert found.text[slice(*found.subject)] == "France"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            UPPER.replace("CAPITAL", "France CAPITAL"),
            "changes the prompt's text, and 'France' is in the result 2 times",
        ),
        ("{% for m in messages %}hello{% endfor %}", "'France' is in the result 0 times"),
        (STRICT, r"refuses it \(system first\); pass --system TEXT or --template-args"),
        ("{{ 1 / 0 }}", r"refuses it \(division by zero\)"),
        ("{% for %}", "refuses it"),
        ("{{ messages[7]['content'] }}{{ nothing.more }}", "refuses it"),
    ],
)
def test_a_template_that_cannot_be_used_refuses_the_edit_by_its_line(template: str, reason: str) -> None:
    with pytest.raises(RequestError, match=f"^facts.jsonl:7: .*{reason}"):
        tokens(template).check(request())


def test_the_system_message_and_the_arguments_reach_the_template() -> None:
    found = tokens(STRICT + "{{ mood }}", system="Be short.", arguments={"mood": "calm "}).locate(request())
    assert found.text == "[system] Be short.\n[user] The capital of France is\n[assistant] calm "


def test_one_of_several_templates_is_chosen_by_name() -> None:
    several = {"rag": TRIMS + "rag: ", "tool_use": UPPER}
    with pytest.raises(ModelError, match=r"several chat templates and no default one \(rag, tool_use\); choose with"):
        tokens(several)
    with pytest.raises(OptionError, match="no chat template 'rage'; did you mean 'rag'"):
        tokens(several, arguments={"chat_template": "rage"})
    assert tokens(several, arguments={"chat_template": "rag"}).locate(request()).text.endswith("rag: ")
    assert tokens({"default": CHAT_TEMPLATE, **several}).locate(request()).text.endswith("[assistant] ")


@pytest.mark.parametrize(
    ("form", "written"),
    [
        ("%d %b %Y", "06 Jul 2024"),
        ("%-d. %B, %H:%M", "6. July, 09:05"),
        ("100%% %A", "100% Saturday"),
        ("%Y-%m-%dT%H:%M:%S.%f", "2024-07-06T09:05:00.000000"),
    ],
)
@pytest.mark.parametrize("start", ["", "\n", "  {% if true %}x{% endif %}\n"])
def test_a_template_reads_the_time_that_it_is_given(form: str, written: str, start: str) -> None:
    plain = tokens(f"{start}{written}\n{CHAT_TEMPLATE}").locate(request())
    template = f"{start}{{% set form = '{form}' %}}{{{{ strftime_now(form) }}}}\n{CHAT_TEMPLATE}"
    assert tokens(template, clock="2024-07-06T09:05:00").locate(request()).text == plain.text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"tokenize": true}', "cannot set 'tokenize'"),
        ('{"a b": 1}', "cannot set 'a b'"),
    ],
)
def test_arguments_that_are_no_variables_are_refused(text: str, reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        parse_arguments(text)


@pytest.mark.parametrize("given", [{"system": "x"}, {"template_args": {"a": 1}}])
def test_settings_of_a_template_that_is_not_used_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="add --chat-template"):
        Recipe(edits="x.jsonl", **given)


def test_the_card_repeats_what_the_template_was_given() -> None:
    recipe = Recipe(
        edits="x.jsonl",
        chat_template=True,
        system="Be short.",
        template_args={"think": False},
        template_clock="2024-07-26",
    )
    assert command_line(recipe) == (
        "editcli apply x.jsonl --chat-template --system 'Be short.' --template-args '{\"think\": false}'"
    )


@pytest.mark.parametrize(
    ("template", "arguments", "mark"),
    [
        (THINKS, {}, "<think>"),
        (THINKS, {"enable_thinking": False}, None),
        (THOUGHT, {}, None),
        (CHAT_TEMPLATE + "[THINK]", {}, "[THINK]"),
        (CHAT_TEMPLATE + "<|begin_of_thought|>", {}, "<|begin_of_thought|>"),
        (CHAT_TEMPLATE + "<seed:think>", {}, "<seed:think>"),
        ("<think>rules</think>" + CHAT_TEMPLATE, {}, None),
        (STRICT, {}, None),
    ],
)
def test_a_thinking_block_that_stays_open_is_a_warning(
    template: str, arguments: dict[str, Any], mark: str | None
) -> None:
    warning = thinking_warning(tokens(template, arguments=arguments))
    assert (warning is None) if mark is None else (warning is not None and f"({mark})" in warning)


def test_the_warning_reaches_check_and_apply(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facts.jsonl").write_text(json.dumps(request().to_json()))
    chat = ("--model", str(folder(THINKS)), "--chat-template")
    for command in (("check", "facts.jsonl"), ("apply", "facts.jsonl", "--dry-run", "--editor", "ft")):
        for arguments, count in (("{}", 1), ('{"enable_thinking": false}', 0)):
            assert main([*command, *chat, "--template-args", arguments]) == 0
            said = capsys.readouterr()
            assert " ".join((said.out + said.err).split()).count("opens a thinking block") == count


def test_the_clock_that_a_template_reads_is_the_runs(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The template writes the microsecond, so any two readings of a real clock give other tokens."""
    model, facts = folder(DATED), tmp_path / "facts.jsonl"
    edits = [request(subject=name).to_json() | {"id": name} for name in ("France", "Spain")]
    write_lines(facts, edits)
    for name, limits in (("whole", (2,)), ("resumed", (1, 2))):
        for number, limit in enumerate(limits):
            clock = {} if number else {"template_clock": "2024-07-26T10:00:00"}
            asked = {"out": tmp_path / name, "batch_size": 1, "limit": limit, "resume": number > 0, **clock, **QUICK}
            editcli.edit(model, facts, **asked)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed")]
    assert weights[0] == weights[1]
    record = tmp_path / "whole/editcli/run.json"
    assert main(["apply", "--repeat", str(record), "--out", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["repeats"]["identical"]
    with pytest.raises(StateError, match="made with chat = clock"):
        editcli.edit(model, facts, out=tmp_path / "whole", resume=True, template_clock="2025-01-01T00:00:00", **QUICK)


def test_a_run_records_the_time_that_its_template_read(folder: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    editcli.edit(folder(DATED), [request()], out=out, **QUICK)
    recipe = json.loads((out / "editcli/run.json").read_text())["recipe"]
    assert ChatSettings(clock=recipe["template_clock"]).now.isoformat() == recipe["template_clock"]


def test_further_templates_are_kept_in_the_result(folder: Any, tmp_path: Path) -> None:
    model = folder(CHAT_TEMPLATE)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/rag.jinja").write_text(TRIMS)
    out = tmp_path / "out"
    editcli.edit(model, [request()], out=out, **QUICK)
    assert (out / "additional_chat_templates/rag.jinja").read_text() == TRIMS
    patch = ["export", str(out), "--format", "patch", "--out", str(tmp_path / "patch")]
    assert main(["-q", *patch]) == 0
    assert main(["-q", "apply-patch", str(model), str(tmp_path / "patch"), "--out", str(tmp_path / "rebuilt")]) == 0
    assert (tmp_path / "rebuilt/additional_chat_templates/rag.jinja").read_text() == TRIMS
