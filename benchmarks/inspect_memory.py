"""Show that ``inspect`` needs the memory of one matrix and not of the model.

Writes two sharded random Llama checkpoints of about ``--gib`` GiB each (bfloat16), then inspects the second with the
first as its base, each time in a process of its own, and prints the peak resident memory beside that of a process that
only imports what inspect needs. The result goes to benchmarks/results/inspect_memory.json.

    python -m benchmarks.inspect_memory --gib 2

With ``--spectral`` one layer is decomposed as well; ``--hidden 4096 --intermediate 14336`` are the shapes of a
Llama-3-8B, which takes minutes for each of its matrices on a CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from benchmarks.common import write_result

VOCABULARY = 32_000
SHARD_LAYERS = 4


@dataclass(frozen=True, slots=True)
class Widths:
    """Widths of a Llama."""

    hidden: int
    intermediate: int


def config(widths: Widths, layers: int) -> dict[str, object]:
    """Return the configuration of a Llama of ``layers`` layers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": widths.hidden,
        "intermediate_size": widths.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def shapes(widths: Widths, layer: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of one layer."""
    prefix, hidden, inner = f"model.layers.{layer}", widths.hidden, widths.intermediate
    return {
        f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
        f"{prefix}.mlp.up_proj.weight": (inner, hidden),
        f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        f"{prefix}.self_attn.q_proj.weight": (hidden, hidden),
        f"{prefix}.self_attn.k_proj.weight": (hidden // 4, hidden),
        f"{prefix}.self_attn.v_proj.weight": (hidden // 4, hidden),
        f"{prefix}.self_attn.o_proj.weight": (hidden, hidden),
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
    }


def write(folder: Path, widths: Widths, layers: int, *, seed: int) -> int:
    """Write a checkpoint shard by shard; return its size in bytes."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    outer = {"model.embed_tokens.weight": (VOCABULARY, widths.hidden), "model.norm.weight": (widths.hidden,)}
    groups = [outer]
    for start in range(0, layers, SHARD_LAYERS):
        own = range(start, min(start + SHARD_LAYERS, layers))
        groups.append({name: shape for layer in own for name, shape in shapes(widths, layer).items()})
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {key: _random(shape, generator) for key, shape in group.items()}
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(widths, layers)))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draw a tensor whose columns differ in scale, so that its spectrum decays as that of a trained weight does."""
    scale = 0.02 * torch.randn(shape[-1], generator=generator).exp()
    return (torch.randn(shape, generator=generator) * scale).bfloat16()


def peak(arguments: list[str]) -> tuple[float, float]:
    """Run a command; return its peak resident memory (GiB) and its seconds."""
    started = time.perf_counter()
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
        "sys.exit(done.returncode)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    # Linux counts KiB, macOS bytes.
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return int(done.stdout.splitlines()[-1]) / unit, time.perf_counter() - started


@click.command()
@click.option("--gib", default=2.0, show_default=True, help="Size of each checkpoint.")
@click.option("--hidden", default=2048, show_default=True)
@click.option("--intermediate", default=8192, show_default=True)
@click.option("--spectral", is_flag=True, help="Decompose one layer as well.")
@click.option("--out", type=click.Path(path_type=Path))
def main(gib: float, hidden: int, intermediate: int, spectral: bool, out: Path | None) -> None:
    """Write the checkpoints, inspect them, and show what that took."""
    widths = Widths(hidden, intermediate)
    per_layer = 2 * sum(torch.Size(shape).numel() for shape in shapes(widths, 0).values())
    layers = max(1, round((gib * 2**30 - 2 * VOCABULARY * hidden) / per_layer))
    with tempfile.TemporaryDirectory() as folder:
        base, edited = Path(folder) / "base", Path(folder) / "edited"
        size = write(base, widths, layers, seed=0)
        write(edited, widths, layers, seed=1)
        command = [sys.executable, "-m", "editcli", "inspect", str(edited)]
        commands = {
            "imports alone": [sys.executable, "-c", "import editcli.health.inspect"],
            "inspect": command,
            "inspect --norms --base": [*command, "--norms", "--base", str(base)],
        }
        if spectral:
            commands["inspect --spectral --base, one layer"] = [
                *command,
                *("--spectral", "--layers", "0", "--base", str(base)),
            ]
        runs = {what: dict(zip(("gib", "seconds"), peak(asked), strict=True)) for what, asked in commands.items()}
        shards = len(list(base.glob("*.safetensors")))
    table = Table("command", "peak, GiB", "seconds")
    for what, run in runs.items():
        table.add_row(what, f"{run['gib']:.2f}", f"{run['seconds']:.0f}")
    Console().print(table)
    result = {"bytes": size, "shards": shards, "layers": layers, "hidden": hidden, "intermediate": intermediate}
    write_result("inspect_memory", {**result, "runs": runs}, out)


if __name__ == "__main__":
    main()
