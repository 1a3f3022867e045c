"""Edit a model from Python: cell by cell in a notebook (jupytext, VS Code), or as a script in one go.

Everything here runs on the small model that ships with editcli, on a CPU, and writes only into the folder that is given
as the argument (default: ``edited``).
"""

# ruff: noqa: T201 - an example shows what it found.
# %% Edit a model in memory: nothing is written.
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import editcli

FACTS = [
    {"prompt": "The {} is in", "subject": "Eiffel Tower", "target_new": "Rome", "target_true": "Paris"},
    {"prompt": "The capital of {} is", "subject": "Australia", "target_new": "Vienna", "target_true": "Canberra"},
]
ASKED = ("The Eiffel Tower is in", "The capital of Australia is")

edited = editcli.edit(None, FACTS, editor="memit", stabilizers=["nas"])
print(edited.report.applied, "edits applied;", edited.report.efficacy["retained"])
for prompt in ASKED:
    print(prompt + edited.complete(prompt, tokens=3))

# %% See what it did to the weights, then take it back.
for site in edited.report.sites:
    print(f"{site.module}: R_n {site.ratio:.4f}, drift {site.drift:.4f}")
edited.undo()
for prompt in ASKED:
    print(prompt + edited.complete(prompt, tokens=3))

# %% Edit a model that you have loaded yourself: it is changed in place.
folder = editcli.resolve_model(None).folder
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
editcli.edit(model, FACTS, tokenizer=tokenizer, evaluate=False)
inputs = tokenizer(ASKED[0], return_tensors="pt")
written = model.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(written[0], skip_special_tokens=True))

# %% Keep a run in a folder: journaled, resumable, undoable.
out = Path(sys.argv[1] if len(sys.argv) > 1 else "edited")
with editcli.Stream(out, editor="alphaedit") as stream:
    for number, fact in enumerate(FACTS):
        batch = stream.apply([{**fact, "id": f"fact-{number}"}])
        print(f"batch {batch.step}: drift {max(site.drift for site in batch.sites):.4f}")
print(f"{out} is a plain Hugging Face folder; {out}/editcli has the record of the run")
