"""A model in one GGUF file: its config, tokenizer and weights as transformers reads them, and its edited copy.

The names are transformers' own map from GGUF, and so are the processors that undo what llama.cpp's converter does to
some tensors, such as the order of the rows of q and k. The blocks are dequantised and quantised by the package
``gguf``. One tensor is dequantised at a time, so that a model takes the memory of its weights and no more.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from editcli.errors import ModelError
from editcli.storage.checkpoint import Checkpoint, TensorEntry, file_digest
from editcli.storage.choice import Choice, listed
from editcli.storage.gguf import SUFFIX, GgufHeader, blocks, gguf_library, lists, read_gguf, same_metadata
from editcli.storage.opening import GGUF, open_regular
from editcli.storage.packing import Packed, Piece

SAVED = f"model{SUFFIX}"
"""The file of an edited model."""

WRITABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""Types that are written as they were. The package cannot write the others, of which the k-quants are the commonest."""
BETTER = ("Q8_0", "F16")
"""Types that stand in for those, the first that the length of a row allows."""

_LOGICAL = {"F16": "F16", "BF16": "BF16"}
"""Types whose numbers fit a smaller type than float32."""
_CHOSEN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_WIDTHS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def gguf_in(folder: Path) -> Path | None:
    """Return the only GGUF of a folder; None where there is none, :class:`ModelError` where there are several."""
    files = sorted(path for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith("."))
    if len(files) > 1:
        names = listed(tuple(path.name for path in files))
        raise ModelError(f"{folder} holds several GGUF files ({names}); pass the one to read")
    return files[0] if files else None


def read_config(header: GgufHeader) -> Any:
    """Return the config that transformers makes of a GGUF's metadata; raise :class:`ModelError` where it cannot."""
    with _alone(header.path, "the config") as options:
        config = transformers.AutoConfig.from_pretrained(**options)
    # The numbers are dequantised, so that half of float32's digits hold all that was stored.
    if not isinstance(getattr(config, "dtype", None), torch.dtype):
        config.dtype = torch.bfloat16
    return config


def read_tokenizer(header: GgufHeader) -> Any:
    """Return the tokenizer that transformers makes of a GGUF's metadata; raise :class:`ModelError` where it cannot."""
    with _alone(header.path, "the tokenizer") as options:
        return transformers.AutoTokenizer.from_pretrained(**options)


@contextmanager
def _alone(path: Path, what: str) -> Iterator[dict[str, Any]]:
    """Yield the arguments that make transformers read a GGUF and no file beside it; put its errors in one sentence."""
    with tempfile.TemporaryDirectory() as empty:
        try:
            yield {"pretrained_model_name_or_path": empty, "gguf_file": str(path.resolve()), "local_files_only": True}
        except ModelError:
            raise
        # Transformers, gguf and tokenizers raise errors of many kinds for metadata that they do not understand.
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelError(f"transformers cannot read {what} of {path}: {lines[0]}") from error


class GgufCheckpoint(Checkpoint):
    """The weights of a GGUF under the names of transformers' parameters, dequantised as they are read."""

    def __init__(self, path: Path, skeleton: Callable[[Any], Any]):
        """Take a file; ``skeleton`` builds a model of a config without its weights."""
        super().__init__(path.parent)
        self.path, self._skeleton = path, skeleton

    @property
    def place(self) -> Path:
        """The file."""
        return self.path

    @property
    def described_by(self) -> str:
        """The part of the file that tells the sizes of the model."""
        return "header"

    @property
    def description(self) -> str:
        """Where the sizes of the model are told, for messages."""
        return f"the header of {self.path}"

    @cached_property
    def header(self) -> GgufHeader:
        """The checked header."""
        return read_gguf(self.path)

    @cached_property
    def config(self) -> Any:
        """The config of the model; reading the metadata takes seconds, so that it is read once."""
        return read_config(self.header)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model."""
        return read_tokenizer(self.header)

    @cached_property
    def choice(self) -> Choice:
        """The one file."""
        return Choice((self.path.name,))

    @property
    def saved_files(self) -> tuple[str, ...]:
        """The one file of an edited copy."""
        return (SAVED,)

    @cached_property
    def pieces(self) -> Mapping[str, TensorEntry]:
        """All tensors under the file's own names."""
        return self.header.tensors

    @cached_property
    def stored(self) -> tuple[TensorEntry, ...]:
        """All tensors."""
        return tuple(self.header.tensors.values())

    @cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        """The tensors that transformers uses, by its own names; their type is the one that they are dequantised to."""
        return {name: self._entry(name, own) for own, name in self._names.items() if own in self.header.tensors}

    def remarks(self) -> tuple[str, ...]:
        """Return what transformers does not read."""
        spare = tuple(name for name in self.header.tensors if name not in self._names)
        if not spare:
            return ()
        what = f"transformers does not use {listed(spare)} of {self.path}"
        return (f"{what}, so an engine that does may answer otherwise than is measured here",)

    def stored_as(self, name: str) -> str:
        """Return the block type of a weight."""
        return self.header.tensors[self._own[name]].dtype

    def read(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """Return one weight, dequantised and in transformers' layout."""
        own = self._own[name]
        entry = self.header.tensors[own]
        with open_regular(self.path, GGUF) as file:
            file.seek(entry.start)
            data = file.read(entry.stop - entry.start)
        if len(data) != entry.stop - entry.start:
            raise ModelError(f"{self.path} became shorter while it was read; try again")
        numbers = self._processed(_dequantised(data, entry), own)
        return torch.from_numpy(numbers.copy()).to(self.dtype(name)).to(device)

    def state(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return all weights in ``dtype``, of which one at a time is in float32."""
        return {name: self.read(name).to(dtype) for name in self.entries}

    def encode(self, name: str, weight: Tensor, dtype: torch.dtype | None = None) -> Packed:
        """Quantise a weight into the type in which it is written, and dequantise that again."""
        own = self._own[name]
        block = blocks()[self._kind(name, dtype)]
        turned = self._is_turned(own)
        numbers = weight.detach().cpu().float().numpy()
        numbers = gguf_library().quants.quantize((numbers.T if turned else numbers).copy(), _type(block.kind))
        data = torch.from_numpy(numbers.reshape(-1).view("uint8"))
        entry = self.header.tensors[own]
        value = torch.from_numpy(_dequantised(data.numpy().data, entry, block.kind).copy())
        return Packed({own: Piece(block.kind, data)}, value.T.contiguous() if turned else value)

    def recoded(self, name: str, dtype: torch.dtype | None = None) -> tuple[str, str] | None:
        """Return the types of a weight now and as it is written, where they differ though none was asked for."""
        self._is_turned(self._own[name])
        now, then = self.stored_as(name), self._kind(name, dtype)
        return None if dtype is not None or now == then else (now, then)

    def stored_digest(self, name: str) -> str:
        """Return the sha256 of a weight's blocks."""
        return self.digest_of_pieces((self._own[name],))

    def fingerprint(self) -> str:
        """Return the sha256 of the file."""
        return file_digest(self.path, GGUF)

    def digest_of(self, names: Any) -> str:
        """Return a sha256 over the named weights' blocks."""
        return self.digest_of_pieces(self._own[name] for name in names)

    def reopened(self) -> GgufCheckpoint:
        """Return the file with everything that is known of it forgotten but its names."""
        return self._at(self.path)

    def copy_in(self, folder: Path) -> GgufCheckpoint:
        """Return the edited copy in another folder, which has the same metadata and names."""
        return self._at(folder / SAVED)

    def is_like(self, other: Checkpoint) -> bool:
        """Tell whether another file has the same metadata and the same tensors in the same order."""
        if not isinstance(other, GgufCheckpoint):
            return False
        return same_metadata(self.header, other.header) and lists(self.header) == lists(other.header)

    def _at(self, path: Path) -> GgufCheckpoint:
        other = GgufCheckpoint(path, self._skeleton)
        if "_names" in self.__dict__:
            other.__dict__["_names"] = self._names
        return other

    @cached_property
    def _names(self) -> Mapping[str, str]:
        """The parameter of each tensor of the file."""
        with _alone(self.path, "the names of the tensors"):
            model = self._skeleton(self.config)
            # The map of a module asks for the maps of all modules inside, which takes seconds and is seldom needed.
            names = _names_of(_Shallow(model), self._processor)
            return names if self.header.tensors.keys() <= names.keys() else _names_of(model, self._processor)

    @cached_property
    def _own(self) -> Mapping[str, str]:
        """The tensor of each parameter."""
        return {name: own for own, name in self._names.items() if own in self.header.tensors}

    @cached_property
    def _processor(self) -> Any:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        return TENSOR_PROCESSORS.get(self.header.architecture, TensorProcessor)(config=self.config.to_dict())

    def _processed(self, numbers: Any, own: str) -> Any:
        """Return a tensor in transformers' layout; some processors hand it over on the side."""
        aside: dict[str, dict[str, Any]] = {"tensors": {}}
        done = self._processor.process(
            weights=numbers, name=own, tensor_key_mapping=self._names, parsed_parameters=aside
        )
        return done.weights if done.name is not None else next(iter(aside["tensors"].values())).numpy()

    def _entry(self, name: str, own: str) -> TensorEntry:
        entry = self.header.tensors[own]
        shape = self._shapes.get(name, entry.shape)
        return TensorEntry(name, entry.file, _LOGICAL.get(entry.dtype, "F32"), shape, entry.start, entry.stop)

    @cached_property
    def _shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of weights that a processor turns."""
        stored = ((name, own, self.header.tensors[own]) for name, own in self._own.items())
        return {
            name: (entry.shape[1], entry.shape[0])
            for name, own, entry in stored
            if self._is_a_turned_matrix(own, entry)
        }

    def _is_a_turned_matrix(self, own: str, entry: TensorEntry) -> bool:
        return len(entry.shape) == 2 and self._probe(own) == "turned"

    def _is_turned(self, own: str) -> bool:
        """Tell whether the file holds a matrix the other way round; :class:`ModelError` for any other order."""
        order = self._probe(own)
        if order == "mixed":
            raise ModelError(
                f"{own} of {self.path} is stored in an order that editcli cannot write; choose other layers"
            )
        return order == "turned"

    def _probe(self, own: str) -> str:
        """Return what the processor does to a small matrix: "straight", "turned" or "mixed" it stays."""
        import numpy

        probe = numpy.arange(6, dtype=numpy.float32).reshape(2, 3)
        try:
            seen = self._processed(probe.copy(), own)
        # Processors reshape by the number of heads, which a small matrix does not have.
        except (ValueError, LookupError, TypeError, ArithmeticError, AttributeError):
            return "mixed"
        if numpy.array_equal(seen, probe):
            return "straight"
        return "turned" if numpy.array_equal(seen, probe.T) else "mixed"

    def _kind(self, name: str, dtype: torch.dtype | None) -> str:
        """Return the type in which a weight is written."""
        now = self.stored_as(name)
        if dtype is not None:
            return _CHOSEN[dtype]
        if now in WRITABLE:
            return now
        entry = self.header.tensors[self._own[name]]
        return next(kind for kind in BETTER if entry.shape[-1] % blocks()[kind].length == 0)


class _Shallow:
    """A model of which only the names of its parameters are seen, and no module inside."""

    def __init__(self, model: Any):
        self.config, self.state_dict = model.config, model.state_dict

    def named_children(self) -> list[tuple[str, Any]]:
        """Return none."""
        return []


def _names_of(model: Any, processor: Any) -> dict[str, str]:
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    # Before 5.0 the map was the same for all processors.
    asks = "processor" in inspect.signature(get_gguf_hf_weights_map).parameters
    return dict(get_gguf_hf_weights_map(model, *([processor] if asks else [])))


def _dequantised(data: Any, entry: TensorEntry, kind: str | None = None) -> Any:
    """Return the numbers of a tensor's blocks as a float32 array; :class:`ModelError` for a type that has no way."""
    import numpy

    block = blocks()[kind or entry.dtype]
    width = entry.shape[-1] // block.length * block.size
    array = numpy.frombuffer(data, dtype=numpy.uint8).reshape(*entry.shape[:-1], width)
    try:
        numbers = gguf_library().quants.dequantize(array, _type(block.kind))
    except NotImplementedError as error:
        raise ModelError(
            f"{entry.name} of {entry.file} is stored as {block.kind}, which gguf cannot dequantise; choose another file"
        ) from error
    return numbers.astype(numpy.float32, copy=False)


def _type(kind: str) -> Any:
    return gguf_library().GGMLQuantizationType[kind]
