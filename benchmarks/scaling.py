"""A cost model of a stream: measure its coefficients, say how wrong it is, and predict what was not run.

``python -m benchmarks.scaling`` writes docs/scaling.md from benchmarks/scaling.md and benchmarks/results/. With
``--measure`` it first times the parts of a batch on random models of four sizes (CPU seconds of one thread, two
minutes) and writes benchmarks/results/scaling.json. The page says of every figure whether it was measured or computed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import sample_edits, write_result
from benchmarks.costs import (
    DOUBLE,
    Batch,
    Plan,
    Shape,
    read_flops,
    solve_bytes,
    solve_flops,
    target_flops,
    write_bytes,
)
from benchmarks.scaling_page import PAGE, page
from editcli.editing.session import ModelSession
from editcli.heap import keep_freed
from editcli.models.loading import ModelSource, bundled_folder, load_tokens
from editcli.plugin.interfaces import LowRank, Problem
from editcli.plugin.leastsquares import InverseGram
from editcli.reporting import Silent
from editcli.requests.schema import EditRequest
from editcli.runs.memory import hold
from editcli.settings.core import TargetOptions

RESULTS = Path(__file__).parent / "results"
SHAPES = (
    Shape("small", 256, 1024, 6, 4, 4, 16384),
    Shape("medium", 384, 1536, 8, 6, 2, 16384),
    Shape("large", 512, 2048, 8, 8, 2, 16384),
    Shape("held out", 768, 3072, 10, 12, 4, 16384),
)
"""What is measured; coefficients come from all but the last, which says how far the model carries."""
EDITS, STEPS = 24, 4


def measure(shape: Shape) -> dict[str, Any]:
    """Return CPU seconds of the parts of one batch on a random model, beside what the model counts for them."""
    session, edits = _session(shape), sample_edits(EDITS)
    plan, batch = Plan(shape, session.layers), _counted(session, edits)
    draw = torch.Generator().manual_seed(0)
    values = session.values(edits)
    target_seconds = _best(lambda: session.values(edits))
    problems: list[Problem] = []
    read = _best(lambda: problems.extend(_read(session, edits, values)))
    problems = problems[: len(session.sites)]
    gram = torch.randn(shape.inner, shape.inner, generator=draw, dtype=torch.float64)
    memory = InverseGram(gram @ gram.T / shape.inner, "benchmark", Silent())
    updates = [memory.solve(problem.keys, problem.residual) for problem in problems]

    def solve() -> None:
        for problem in problems:
            memory.solve(problem.keys, problem.residual)
            memory.downdated(problem.keys)

    def write() -> None:
        for problem, update in zip(problems, updates, strict=True):
            session.write(problem.site, LowRank(update.left.float() * 1e-6, update.right.float()))

    counts = {
        "targets": target_flops(plan, batch),
        "reads": read_flops(plan, batch),
        "solves": solve_flops(plan, batch),
        "writes": write_bytes(plan),
    }
    seconds = {"targets": target_seconds, "reads": read, "solves": _best(solve), "writes": _best(write)}
    extra = {"calls": STEPS * (shape.layers - 1 - plan.last), "solve_bytes": solve_bytes(plan, DOUBLE)}
    return {"shape": shape.name, "hidden": shape.hidden, "inner": shape.inner, "layers": shape.layers, **extra} | {
        part: {"counted": counts[part], "seconds": seconds[part]} for part in counts
    }


def matrix_rate(dtype: torch.dtype, size: int = 768) -> float:
    """Return this thread's rate of large matrix products, in operations a second."""
    left, right = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / _best(lambda: left @ right, repeats=5)


def _session(shape: Shape) -> ModelSession:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    tokens = load_tokens(ModelSource(shape.name, bundled_folder()), config)
    options = TargetOptions(steps=STEPS, stop_loss=0.0, lr=0.1)
    return ModelSession(hold(model, tokens.tokenizer), (0, 1), options=options, seed=0)


def _read(session: ModelSession, edits: Sequence[EditRequest], values: Any) -> list[Problem]:
    """Read every site as a batch does, forgetting in between what writing would have changed."""
    session.forget_reads()
    return [Problem(s, session.keys(edits, s), session.residual(edits, s, values)) for s in session.sites]


def _counted(session: ModelSession, edits: Sequence[EditRequest]) -> Batch:
    """Count a batch's tokens as the program would tokenise them."""
    tokens = session.loaded.tokens
    located = [tokens.locate(e.in_context(c), e.target_new) for e in edits for c in ("", *session.prefixes)]
    texts = tokens.encode(located)
    bare = texts[:: 1 + len(session.prefixes)]
    told = sum(len(text.target) for text in texts) + len(edits)
    return Batch(
        edits=len(edits),
        once=len({text.ids[:end] for text in texts for end in range(1, text.lookup + 1)}),
        lookups=sum(text.lookup + 1 for text in texts),
        bare=sum(text.lookup + 1 for text in bare),
        again=sum(len(text.ids) - 1 - text.lookup for text in texts) + len(edits),
        told=told,
        steps=STEPS,
    )


def _best(work: Callable[[], Any], repeats: int = 3) -> float:
    """Return the least CPU seconds of a few calls after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times[1:])


def fitted(rows: Sequence[Mapping[str, Any]], rates: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Return for every part its seconds a counted unit, from all rows but the last, and its error on each row.

    Targets have a second coefficient, the seconds of one step through one layer whatever its size; both come from least
    squares on relative errors. ``share`` is what a part reaches of the measured matrix rate.
    """
    parts: dict[str, dict[str, Any]] = {}
    for part, dtype in (("targets", "float32"), ("reads", "float32"), ("solves", "float64"), ("writes", None)):
        known = rows[:-1]
        columns = [[row[part]["counted"], row["calls"] if part == "targets" else 0.0] for row in known]
        unit, call = _least(columns, [row[part]["seconds"] for row in known])
        errors = {
            row["shape"]: (row[part]["counted"] * unit + row["calls"] * call * (part == "targets"))
            / row[part]["seconds"]
            - 1
            for row in rows
        }
        share = None if dtype is None else 1 / (unit * rates[dtype])
        parts[part] = {"unit": unit, "call": call, "share": share, "errors": errors}
    return parts


def _least(columns: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, float]:
    """Return two coefficients by least squares on relative errors; the second is 0 where it has no column."""
    table = torch.tensor(columns, dtype=torch.float64) / torch.tensor(seconds, dtype=torch.float64)[:, None]
    ones = torch.ones(len(seconds), 1, dtype=torch.float64)
    if bool((table[:, 1] > 0).all()):
        scale = table.norm(dim=0)
        unit, call = (torch.linalg.lstsq(table / scale, ones).solution[:, 0] / scale).tolist()
        if unit > 0 and call > 0:
            return unit, call
    first = table[:, :1]
    return float((first.T @ ones) / (first.T @ first)), 0.0


@click.command()
@click.option("--measure", "anew", is_flag=True, help="Measure the coefficients on this machine first.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the page somewhere else than docs/scaling.md.")
def main(anew: bool, out: Path | None) -> None:
    """Write the page about scaling from what was measured."""
    if anew:
        torch.set_num_threads(1)
        keep_freed()
        rates = {str(kind).removeprefix("torch."): matrix_rate(kind) for kind in (torch.float32, torch.float64)}
        rows = [measure(shape) for shape in SHAPES]
        result = {"edits": EDITS, "steps": STEPS, "rates": rates, "rows": rows, "parts": fitted(rows, rates)}
        write_result("scaling", result, None)
    names = ("scaling", "distributed", "gpu", "stream")
    found = {name: _result(name) for name in names}
    if found["scaling"] is None:
        raise click.UsageError("there are no coefficients yet; add --measure")
    (out or PAGE).write_text(page(found), "utf-8")


def _result(name: str) -> Any:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text("utf-8"))["result"] if path.is_file() else None


if __name__ == "__main__":
    main()
