"""Find and open a model: bundled, folder or hub id; device and dtype chosen by themselves.

Everything works on a local folder. A hub id is fetched into the hub's own cache first, so that the base checkpoint can
be read tensor by tensor afterwards.
"""

from __future__ import annotations

import copy
import importlib.resources
import importlib.util
import itertools
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from editcli.errors import ModelError
from editcli.models.architectures import Architecture, Family, refuse_depth, resolve, skeleton
from editcli.models.chat_settings import ChatSettings
from editcli.models.fit import (
    COMPUTED,
    UNUSABLE,
    Fit,
    examine,
    fit_of,
    is_ordinary,
    quiet,
    refuse_misfit,
    refuse_nonfinite,
    remarks,
    stored_names,
)
from editcli.models.gguf import GgufCheckpoint, gguf_in
from editcli.models.hub import fetch, first_line, is_hub_copy, names_code, page, repository_of
from editcli.models.kv_cache import supports_kv_cache
from editcli.models.offload import device_of
from editcli.models.packed.checkpoint import PackedCheckpoint
from editcli.models.packed.table import checkpoint_in, refuse_format
from editcli.models.sharded import is_split, loading_options
from editcli.models.tokens import Tokens, panics_refused
from editcli.models.towers import auto_class
from editcli.reporting import Reporter, Silent
from editcli.storage.beside import check_small_files
from editcli.storage.checkpoint import Checkpoint, file_digest, owned
from editcli.storage.choice import has_safetensors, refuse_adapter
from editcli.storage.gguf import SUFFIX
from editcli.storage.opening import expanded, is_there
from editcli.storage.pickles import convert_pickles, has_pickles

BUNDLED = "bundled"
"""The name of the small trained model that ships inside the package."""

_RUN = Path("editcli", "state.safetensors")
"""A file that only a run has, before its model is in its folder; exports have the record of the run as well."""
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_REVISION = re.compile(r"^[\w./-]+$")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Converted:
    """A model in pickle files, and its temporary copy in safetensors, which is removed together with this."""

    origin: Path
    folder: Path

    def __post_init__(self) -> None:
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


@dataclass(frozen=True)
class ModelSource:
    """A model folder on this disk, and the name that the user gave for it."""

    name: str
    folder: Path
    revision: str | None = None
    """Branch, tag or commit of a hub id, as it was asked for."""
    gguf: Path | None = None
    """The file that holds the whole model; None for an ordinary folder."""
    converted: Converted | None = None
    """The folder of which this one is a temporary copy; None for any other."""

    @property
    def place(self) -> Path:
        """The path under which the model can be found again."""
        return self.checkpoint.place if self.converted is None else self.converted.origin

    @property
    def commit(self) -> str | None:
        """The commit of a hub repository that this is a copy of."""
        return self.folder.name if self.gguf is None and is_hub_copy(self.folder) else None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model's files; their headers are read once."""
        if self.gguf is not None:
            return GgufCheckpoint(self.gguf, skeleton)
        return checkpoint_in(self.folder, self._names)

    def _names(self, checkpoint: Checkpoint) -> Mapping[str, tuple[str, ...]]:
        try:
            return stored_names(checkpoint, skeleton(load_config(self)))
        except ModelError:
            # A model that only its own code can build has no other names than those that were looked for already.
            return {}

    @cached_property
    def tokenizer_digest(self) -> str:
        """The sha256 of the tokenizer's file; empty where there is none, as in a GGUF, which holds its tokenizer."""
        path = self.folder / "tokenizer.json"
        return file_digest(path) if self.gguf is None and path.is_file() else ""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, in evaluation mode, with what editing needs to know about it."""

    model: Any
    tokens: Tokens
    architecture: Architecture
    source: ModelSource
    weights: Checkpoint | None = None
    """The unedited weights of a model that was not read from the files of its source."""

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The unedited weights: the files that the model was loaded from, unless ``weights`` stand for them."""
        return self.weights or self.source.checkpoint

    @cached_property
    def input_device(self) -> torch.device:
        """Where token ids belong: the device of the input embedding."""
        return device_of(self.model.get_input_embeddings())

    @cached_property
    def supports_kv_cache(self) -> bool:
        """Whether the model can continue from keys and values of earlier tokens; tried once."""
        return supports_kv_cache(self.model, self.input_device)


@dataclass(frozen=True, slots=True)
class Loading:
    """Settings of loading a model."""

    device: str = "auto"
    dtype: str = "auto"
    device_map: Any = None
    chat_template: bool | ChatSettings = False
    trust_remote_code: bool = False
    quantisation: Any = None
    """How transformers is to quantise the weights while it loads them: one of its own configs; None for not at all."""

    @classmethod
    def of(cls, recipe: Any) -> Loading:
        """Return what the fields of a recipe say; ``chat`` is its chat template, for a recipe that has one."""
        chat = getattr(recipe, "chat", False)
        return cls(recipe.device, recipe.dtype, recipe.device_map, chat, recipe.trust_remote_code)


def bundled_folder() -> Path:
    """Return the folder of the bundled model."""
    return Path(str(importlib.resources.files("editcli") / "bundled"))


def resolve_model(
    source: str | Path | None,
    *,
    revision: str | None = None,
    weights: bool = True,
    code: bool = False,
    convert: bool = False,
) -> ModelSource:
    """Return the local folder of a model; fetch a hub id when it is not cached. Raises :class:`ModelError`.

    ``ID@REVISION`` names a branch, tag or commit of a hub id as well, wherever a model can be named. Without
    ``weights`` only the small files of a hub id are fetched, and its Python files with ``code`` alone. A folder of the
    hub's cache is the commit that it is a copy of, under the repository's id. With ``convert`` a folder of pickle
    files is converted into a temporary copy, which goes with the source.
    """
    if source is None or str(source) == BUNDLED:
        return ModelSource(BUNDLED, bundled_folder())
    name = str(source)
    folder = expanded(name)
    if folder.is_dir():
        refuse_adapter(folder)
        if not is_there(folder / "config.json"):
            file = gguf_in(folder)
            if file is not None:
                return _of_file(name, file)
            if (folder / _RUN).is_file():
                raise ModelError(
                    f"the run in {name} has written no model yet; continue it with 'editcli apply --resume'"
                )
            raise ModelError(f"{name} is a folder without config.json; is it a Hugging Face model folder?")
        folder = folder.resolve()
        check_small_files(folder)
        if convert and weights and has_pickles(folder) and not has_safetensors(folder):
            return _converted(name, folder)
        repository = repository_of(folder)
        return ModelSource(name, folder) if repository is None else ModelSource(repository, folder, folder.name)
    if folder.exists():
        if folder.suffix == SUFFIX:
            return _of_file(name, folder)
        raise ModelError(f"{name} is a file; pass the model's folder, or a file that ends in {SUFFIX}")
    id, at, pinned = name.partition("@")
    if name.startswith((".", "/", "~")) or not _HUB_ID.match(id) or (at and not _REVISION.match(pinned)):
        raise ModelError(f"there is no model folder {name}; check the path")
    if at and revision not in (None, pinned):
        raise ModelError(f"{name} names the revision {pinned}, and --revision {revision} another; give one of them")
    revision = pinned if at else revision
    return ModelSource(id, fetch(id, revision, weights=weights, code=code), revision)


def _of_file(name: str, file: Path) -> ModelSource:
    """Return the model of a GGUF; raise :class:`ModelError` where its header cannot be true."""
    file = file.absolute()
    source = ModelSource(name, file.parent.resolve(), gguf=file)
    assert isinstance(source.checkpoint, GgufCheckpoint), "it has a file"
    source.checkpoint.header  # noqa: B018 - a damaged file is refused before any library opens it.
    return source


def _converted(name: str, folder: Path) -> ModelSource:
    made = Converted(folder, Path(tempfile.mkdtemp(prefix="editcli-bin-")))
    convert_pickles(folder, made.folder)
    return ModelSource(name, made.folder, converted=made)


def model_in(folder: Path) -> ModelSource:
    """Return the model that a run or an export has written to a folder."""
    file = None if is_there(folder / "config.json") else gguf_in(folder)
    return ModelSource(str(folder), folder, gguf=file)


def first_model(places: Iterable[str], *, code: bool = False, convert: bool = False) -> ModelSource | None:
    """Return the first of some places where there is a model; None where there is none in any of them."""
    for place in places:
        try:
            return resolve_model(place, code=code, convert=convert)
        except ModelError:
            # It was moved or is out of reach; another place may still lead to it.
            continue
    return None


def open_model(
    source: ModelSource,
    loading: Loading | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    device_map: Any = None,
    families: Sequence[Family] = (),
    chat_template: bool | ChatSettings = False,
    trust_remote_code: bool = False,
    split: bool = False,
    reporter: Reporter | None = None,
) -> LoadedModel:
    """Load model and tokenizer from a local folder; raise :class:`ModelError` with one sentence when that fails.

    ``loading`` stands for ``device``, ``dtype``, ``device_map``, ``chat_template`` and ``trust_remote_code``. A
    checkpoint that lacks what the model needs, or holds numbers that are not finite, is refused; ``reporter`` warns of
    anything else that is strange about it. With ``split`` the model is spread over all processes of torch's process
    group, by its family's own plan.
    """
    loading = loading or Loading(device, dtype, device_map, chat_template, trust_remote_code)
    checkpoint, trusted = source.checkpoint, loading.trust_remote_code
    checkpoint.entries  # noqa: B018 - damaged or pickled weights are refused before anything is built.
    config = load_config(source, trust_remote_code=trusted)
    tokens = load_tokens(source, config, chat_template=loading.chat_template, trust_remote_code=trusted)
    if not is_ordinary(checkpoint):
        # For a checkpoint like this, the error of the loaded model depends on the version of transformers.
        bare = skeleton(config, trusted)
        refuse_misfit(examine(checkpoint, bare), checkpoint, bare)
    model, fit = _read_weights(source, checkpoint, config, loading, split=split)
    model.eval().requires_grad_(False)
    refuse_nonfinite(model, checkpoint)
    for text in remarks(fit, checkpoint):
        (reporter or Silent()).warn(text)
    # Where the editable matrices are is read off the unquantised model, whose weights have their shapes.
    plain = model if loading.quantisation is None else skeleton(config, trusted)
    architecture = replace(resolve(plain, families), model=model)
    return LoadedModel(model, tokens.of_model(model), architecture, source)


def describe_model(source: ModelSource, loading: Loading, families: Sequence[Family] = ()) -> LoadedModel:
    """Return a model without its weights: tokenizer, names and shapes, on the meta device."""
    trusted = loading.trust_remote_code
    config = load_config(source, trust_remote_code=trusted)
    tokens = load_tokens(source, config, chat_template=loading.chat_template, trust_remote_code=trusted)
    model = skeleton(config, trusted)
    return LoadedModel(model, tokens.of_model(model), resolve(model, families), source)


def _read_weights(
    source: ModelSource, checkpoint: Checkpoint, config: Any, loading: Loading, *, split: bool
) -> tuple[Any, Fit]:
    """Return the model on its device, and how its checkpoint fits it."""
    place = choose_device(loading.device)
    if loading.device_map and importlib.util.find_spec("accelerate") is None:
        raise ModelError("spreading a model over devices needs accelerate: pip install 'editcli[sharding]'")
    options = {"device_map": loading.device_map} if loading.device_map else _straight_to(place)
    options = loading_options(config) if split else options
    if loading.quantisation is not None:
        # Quantised weights are made where they are to lie, also on a CPU.
        options = {**(options or {"device_map": {"": place}}), "quantization_config": loading.quantisation}
    dtype = choose_dtype(loading.dtype, config, place)
    with _in_one_sentence(source, place), quiet():
        state = checkpoint.state(dtype)
        model_class: Any = auto_class(config)
        if state is None:
            options |= {"trust_remote_code": loading.trust_remote_code, "local_files_only": True}
            options["use_safetensors"] = True
        else:
            # Only the class itself takes weights that lie in no file of transformers'.
            model_class = type(skeleton(config, loading.trust_remote_code))
            options["state_dict"] = state
        model, info = model_class.from_pretrained(
            source.folder if state is None else None,
            config=config,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            # The names of its tensors that the model and the checkpoint do not share.
            output_loading_info=True,
            **options,
        )
        fit = fit_of(info, model)
        refuse_misfit(fit, checkpoint, model)
        if loading.quantisation is not None:
            # The field says how the files are stored, and these are not quantised.
            del model.config.quantization_config
        if "device_map" not in options:
            model = model.to(place)
        # Once nothing else holds what was read, each tensor is freed as soon as it is copied.
        del state
        options.pop("state_dict", None)
        _own(model)
    return model, fit


@contextmanager
def _in_one_sentence(source: ModelSource, place: torch.device) -> Iterator[None]:
    """Raise :class:`ModelError` for whatever transformers raises while it loads a model."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"the model in {source.folder} does not fit the memory of {place}; use a smaller --dtype, --device cpu or "
            "--device-map auto"
        ) from error
    # Transformers and safetensors raise many kinds of errors for an unusable folder; the user can correct it.
    except UNUSABLE as error:
        raise ModelError(f"cannot load the model in {source.folder}: {first_line(error)}") from error


def refuse_unopenable(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Raise :class:`ModelError` unless transformers opens a saved folder for a user who has nothing but the folder.

    Config, code, tokenizer and the choice of the weights' files are those of ``from_pretrained(folder)``; of the
    weights only names and shapes are read.
    """
    source = model_in(folder)
    if source.gguf is not None:
        # It has the metadata of the file that was opened, byte for byte.
        return
    config = load_config(source, trust_remote_code=trust_remote_code)
    load_tokens(source, config, trust_remote_code=trust_remote_code)
    bare = skeleton(config, trust_remote_code)
    refuse_misfit(examine(source.checkpoint, bare), source.checkpoint, bare)


def _own(model: Any) -> None:
    """Take a model's tensors out of the files that transformers maps on the CPU; see :func:`owned`."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if not (tensor.is_meta or is_split(tensor)):
            tensor.data = owned(tensor.data)


def _straight_to(place: torch.device) -> dict[str, Any]:
    """Return what makes transformers read the weights straight onto an accelerator, without a copy in main memory.

    It does so through accelerate only; a map of one device puts no hooks on the modules.
    """
    if place.type == torch.device("cpu").type or importlib.util.find_spec("accelerate") is None:
        return {}
    return {"device_map": {"": place}}


def load_config(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """Read a model's config."""
    if isinstance(source.checkpoint, GgufCheckpoint):
        refuse_depth(source.checkpoint.config)
        return copy.deepcopy(source.checkpoint.config)
    try:
        config = transformers.AutoConfig.from_pretrained(
            source.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    # A value of the wrong kind fails wherever the class of the config first looks at it, with errors of many libraries.
    except Exception as error:
        _refuse_code(source, "config.json", trust_remote_code, error)
        raise ModelError(f"cannot read the config of {source.folder}: {first_line(error)}") from error
    refuse_format(source.folder)
    if isinstance(source.checkpoint, PackedCheckpoint):
        # The weights are handed over as plain numbers.
        delattr(config, "quantization_config")
    refuse_depth(config)
    kind = getattr(config, "dtype", None)
    if isinstance(kind, torch.dtype) and kind not in COMPUTED:
        raise ModelError(
            f"the config of {source.folder} gives the dtype {str(kind).removeprefix('torch.')}, in which torch does "
            "not compute; write bfloat16, float16 or float32 there"
        )
    return config


def load_tokens(
    source: ModelSource, config: Any, *, chat_template: bool | ChatSettings = False, trust_remote_code: bool = False
) -> Tokens:
    """Read a model's tokenizer; raise :class:`ModelError` when it is not a fast one."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(source.checkpoint, GgufCheckpoint):
        return Tokens(source.checkpoint.tokenizer, max_length=length, chat_template=chat_template)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source.folder, use_fast=True, trust_remote_code=trust_remote_code, local_files_only=True
        )
        _try_out(tokenizer)
    # The tokenizers library raises a bare Exception for a file that it cannot parse.
    except Exception as error:
        _refuse_code(source, "tokenizer_config.json", trust_remote_code, error)
        # The message of transformers about a folder without one is about packages to install.
        if not any(source.folder.glob("tokenizer*")):
            what = "has no tokenizer; copy tokenizer.json and tokenizer_config.json into it"
            raise ModelError(f"{source.folder} {what}") from error
        raise ModelError(f"cannot load a tokenizer from {source.folder}: {first_line(error)}") from error
    return Tokens(tokenizer, max_length=length, chat_template=chat_template)


def _try_out(tokenizer: Any) -> None:
    """Use a tokenizer once: a setting of another type is noticed only then, as one of many errors."""
    with panics_refused():
        ids = tokenizer("a", verbose=False)["input_ids"]
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    _ = tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id


def _refuse_code(source: ModelSource, file: str, trusted: bool, error: Exception) -> None:
    """Raise :class:`ModelError` when a file could not be read because of the Python code that it names."""
    if not names_code(source.folder / file):
        return
    if trusted:
        if isinstance(error, PermissionError):
            raise ModelError(
                f"the Python code of {source.name} cannot be copied to {error.filename}, from where transformers runs "
                f"it ({error.strerror}); set HF_HOME to a folder that can be written"
            ) from error
        return
    code = f"{page(source.name)}/tree/{source.folder.name}" if source.commit else str(source.folder)
    raise ModelError(
        f"{source.name} needs Python code of its own, which editcli does not run by default; read "
        f"the code in {code}, and add --trust-remote-code if you trust it"
    )


def choose_device(device: str) -> torch.device:
    """Return the device asked for, or the accelerator when there is one, else the CPU."""
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    cannot = f"the device {device!r} cannot be used here"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"{cannot}: torch knows none of that name; use auto or cpu") from error
    try:
        torch.empty(1, device=place)
    # Torch raises any of these for an absent backend.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"{cannot}: {first_line(error)}; use auto or cpu") from error
    return place


def choose_dtype(dtype: str, config: Any, device: torch.device) -> torch.dtype:
    """Return the dtype asked for; ``auto`` is the checkpoint's own on an accelerator and float32 on a CPU."""
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ModelError(f"the dtype {dtype!r} is not one of auto, {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    if device.type == torch.device("cpu").type:
        # Half precision saves no time on most CPUs and loses digits that target optimisation needs.
        return torch.float32
    stored = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32
