"""Every command that writes, on a folder with a base, a run of it, a patch, edits and texts."""

from __future__ import annotations

FACT = {"prompt": "The capital of {} is", "target_new": "Rome"}
APPLY = (
    *("--model", "base", "--corpus", "corpus.txt", "--layers", "1-2", "--device", "cpu", "--no-eval"),
    *("-o", "targets.steps=1", "-o", "targets.prefixes=0", "--batch-size", "1"),
)
CPU = ("--device", "cpu")
MORE = ("apply", "more.jsonl", *APPLY, "--out", "run", "--resume")
EXPORT = ("export", "run", "--base", "base", "--device", "cpu", "--no-eval", "--out", "new", "--format")
COMMANDS = {
    "apply": ("apply", "facts.jsonl", *APPLY, "--out", "new"),
    "resume": MORE,
    "undo": ("undo", "run"),
    "export lora": (*EXPORT, "lora"),
    "export patch": (*EXPORT, "patch"),
    "export full": (*EXPORT, "full"),
    "apply-patch": ("apply-patch", "base", "patch", "--out", "new"),
    "stats": ("stats", "compute", "base", "--corpus", "corpus.txt", *CPU, "--tokens", "90", "--out", "new"),
    "bench": ("bench", "--stacks", "memit", "--edits", "facts.jsonl", "--model", "base", *CPU, "--out", "new"),
    "tune": (
        *("tune", "base", "facts.jsonl", "--corpus", "corpus.txt", "--sample", "1", "--trials", "1", "--out", "new"),
        *("-o", "targets.steps=1", "-o", "targets.prefixes=0", "--text", "text.txt"),
    ),
    "convert": ("convert", "array.json", "--out", "new"),
    "report": ("report", "run", "--base", "base", "--no-spectra", "--out", "new"),
}
