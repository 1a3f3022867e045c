"""Show that ``inspect`` needs the memory of one matrix and not of the model.

Writes two sharded random Llama checkpoints of about ``--gib`` GiB each (bfloat16), then inspects the second with the
first as its base, each time in a process of its own, and prints the peak resident memory beside that of a process that
only imports what inspect needs.

    python benchmarks/inspect_memory.py --gib 2 --folder inspect-memory
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE = 2048, 8192
SHARD_LAYERS = 4


def config(layers: int) -> dict[str, object]:
    """Return the configuration of a Llama of ``layers`` layers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def shapes(layer: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of one layer."""
    prefix = f"model.layers.{layer}"
    return {
        f"{prefix}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{prefix}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        f"{prefix}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        f"{prefix}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        f"{prefix}.self_attn.k_proj.weight": (HIDDEN // 4, HIDDEN),
        f"{prefix}.self_attn.v_proj.weight": (HIDDEN // 4, HIDDEN),
        f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{prefix}.input_layernorm.weight": (HIDDEN,),
        f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
    }


def write(folder: Path, layers: int, seed: int) -> int:
    """Write a checkpoint shard by shard; return its size in bytes."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    outer = {"model.embed_tokens.weight": (32000, HIDDEN), "model.norm.weight": (HIDDEN,)}
    groups = [outer, *(_layers(start, min(start + SHARD_LAYERS, layers)) for start in range(0, layers, SHARD_LAYERS))]
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {key: _random(shape, generator) for key, shape in group.items()}
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(layers)))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Draw a tensor whose columns differ in scale, so that its spectrum decays as that of a trained weight does."""
    scale = 0.02 * torch.randn(shape[-1], generator=generator).exp()
    return (torch.randn(shape, generator=generator) * scale).bfloat16()


def _layers(start: int, stop: int) -> dict[str, tuple[int, ...]]:
    return {name: shape for layer in range(start, stop) for name, shape in shapes(layer).items()}


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


def main() -> None:
    """Write the checkpoints, inspect them, print one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0, help="size of each checkpoint")
    parser.add_argument("--folder", type=Path, required=True, help="where to write; removed afterwards")
    parser.add_argument("--spectral", action="store_true", help="decompose two layers as well")
    options = parser.parse_args()
    per_layer = 2 * sum(torch.Size(shape).numel() for shape in shapes(0).values())
    layers = max(1, round((options.gib * 2**30 - 2 * 32000 * HIDDEN) / per_layer))
    base, edited = options.folder / "base", options.folder / "edited"
    try:
        size = write(base, layers, seed=0)
        write(edited, layers, seed=1)
        print(
            f"each checkpoint: {size / 2**30:.2f} GiB, {layers} layers, {len(list(base.glob('*.safetensors')))} shards"
        )
        command = [sys.executable, "-m", "editcli", "inspect", str(edited)]
        print("imports alone: {:.2f} GiB, {:.0f} s".format(*peak([sys.executable, "-c", "import editcli.inspection"])))
        print("inspect: {:.2f} GiB, {:.0f} s".format(*peak(command)))
        print("--norms --base: {:.2f} GiB, {:.0f} s".format(*peak([*command, "--norms", "--base", str(base)])))
        if options.spectral:
            more = ["--spectral", "--layers", "0-1", "--base", str(base)]
            print("--spectral of two layers: {:.2f} GiB, {:.0f} s".format(*peak([*command, *more])))
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
