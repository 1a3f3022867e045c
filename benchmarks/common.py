"""What the benchmarks share: random models of a given shape on disk, repeated timing, JSON results."""

from __future__ import annotations

import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from editcli.models.loading import LoadedModel, ModelSource, bundled_folder, load_tokens, open_model, resolve_model
from editcli.requests.schema import EditRequest, from_record
from editcli.runs.memory import hold

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    "gpt2-124m": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
"""Shapes of models people edit; weights are random, so only times mean anything."""

VOCABULARY: Mapping[str, int] = {
    "tiny": 4096,
    "gpt2-124m": 50257,
    "smollm2-135m": 49152,
    "llama-1b": 128256,
    "llama-3-8b": 128256,
}


def random_model(shape: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> LoadedModel:
    """Build a random model of a known shape in memory, with the bundled model's tokenizer."""
    fields = dict(SHAPES[shape])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields, vocab_size=VOCABULARY[shape])
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    model.eval().requires_grad_(False)
    tokens = load_tokens(ModelSource(shape, bundled_folder()), config)
    # The model lies in no folder, so its weights as they are now are the baseline.
    return hold(model, tokens.tokenizer)


def bundled(device: str = "cpu") -> LoadedModel:
    """Open the bundled model."""
    return open_model(resolve_model(None), device=device)


def sample_edits(count: int) -> list[EditRequest]:
    """Return invented edits of the length of CounterFact's."""
    people = ("Orla Vintrec", "Tam Ostrevel", "Ines Kalbrand", "Jorun Applewhit", "Mira Tolvane")
    prompts = ("The mother tongue of {} is", "{} works as a", "In the end, {} moved to the city of", "{} is known for")
    targets = ("Danish", "painter", "Lisbon", "a violin")
    return [
        from_record(
            {
                "id": str(index),
                "prompt": prompts[index % len(prompts)],
                "subject": f"{people[index % len(people)]} {index}",
                "target_new": targets[index % len(targets)],
            }
        )
        for index in range(count)
    ]


def timed(work: Callable[[], Any], *, repeats: int, synchronize: Callable[[], None] = lambda: None) -> list[float]:
    """Return wall seconds of ``repeats`` calls after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - started)
    return times


def median(times: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(times)


def peak_memory() -> int:
    """Return this process's peak resident memory in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # What getrusage says on Linux includes the process that started this one.
        facts = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(facts["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def run_folders(folder: Path) -> dict[str, Path]:
    """Return the runs of a bench, or of a horizon, which keeps each bench in a folder of its own, by their names."""
    runs: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        below = [path, *sorted(inner for inner in path.iterdir() if inner.is_dir())]
        run = next((inner for inner in below if (inner / "editcli").is_dir()), None)
        if run is not None:
            runs[path.name] = run
    return runs


def write_result(name: str, result: Any, out: Path | None) -> None:
    """Write a benchmark's result as JSON beside the others, with the machine it ran on."""
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    path = out or Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, "machine": machine, "result": result}, indent=2) + "\n", "utf-8")
