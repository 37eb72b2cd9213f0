"""Reads the published reward heads: zip files that `torch.save` made of a whole pickled module.

Unpickling such a file the usual way runs whatever it names. Here nothing that a file names is ever called: each of a
fixed list of names stands for an inert record or for a function of this module, and any other name is refused.
"""

import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

MAX_PICKLE_BYTES = 1 << 20
MAX_TENSOR_BYTES = 1 << 28  # of all tensors together; a published head has half a megabyte


class NotPublished(ValueError):
    """The file is no published head; the message says what it is or which name in it was refused."""


class PublishedHead(NamedTuple):
    """Raw tensors of a published head: r = tanh(fc2 relu(fc1 x)). Shapes (128, h), (128,), (1, 128), (1,)."""

    fc1_weight: torch.Tensor
    fc1_bias: torch.Tensor
    fc2_weight: torch.Tensor
    fc2_bias: torch.Tensor


class _Record:
    """Stands for a module of the file: keeps its state, does nothing."""

    def __setstate__(self, state):
        if not isinstance(state, dict):
            raise NotPublished("a module whose state is no dict")
        self.__dict__.update(state)


class _Names(dict):
    """Stands for an ordered dict, of pairs or filled after it was made."""

    def __init__(self, pairs=(), *_):
        super().__init__(pairs)


class _Nothing:
    """Stands for the empty sets of a module's state."""

    __slots__ = ()

    def __call__(self, *_) -> None:
        return None


class _Storage(NamedTuple):
    values: np.ndarray


class _RebuildTensor:
    """A copy of the part of a storage that a tensor of this size and stride covers; checks that it is inside."""

    __slots__ = ()  # nothing that a file could set

    def __call__(self, storage, offset, size, stride, *_) -> torch.Tensor:
        numbers = (offset, *size, *stride)
        if not isinstance(storage, _Storage) or len(size) != len(stride) or len(size) > 2:
            raise NotPublished("a tensor that no head has")
        if not all(isinstance(n, int) and 0 <= n < 1 << 31 for n in numbers):
            raise NotPublished("a tensor of impossible shape")
        end = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
        if max(math.prod(size), end) > len(storage.values):
            raise NotPublished("a tensor that reaches outside its storage")
        return torch.from_numpy(storage.values).as_strided(size, stride, offset)  # a view: nothing is allocated


class _RebuildParameter:
    """The tensor of a parameter."""

    __slots__ = ()

    def __call__(self, tensor, *_):
        return tensor


# storages that a published head may name -> the numbers in them (looked up by name: nothing that could be called)
_STORAGES = {"FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16}
# what a published head may name -> what is used in its place
_ALLOWED = {
    ("__main__", "reward_function"): _Record,
    ("torch.nn.modules.linear", "Linear"): _Record,
    ("torch.nn.modules.activation", "ReLU"): _Record,
    ("torch.nn.modules.activation", "Tanh"): _Record,
    ("torch.nn.modules.dropout", "Dropout"): _Record,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    ("collections", "OrderedDict"): _Names,
    ("__builtin__", "set"): _Nothing(),
    ("builtins", "set"): _Nothing(),
    **{("torch", name): name for name in _STORAGES},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, archive: zipfile.ZipFile, folder: str):
        super().__init__(file)
        self._archive, self._folder, self._left = archive, folder, MAX_TENSOR_BYTES
        self._storages: dict[tuple, _Storage] = {}

    def find_class(self, module: str, name: str):
        if (module, name) not in _ALLOWED:
            named = f"{module}.{name}".encode("unicode_escape").decode()[:200]
            raise NotPublished(f"it names {named}, which no published head does; nothing of it was run")
        return _ALLOWED[module, name]

    def persistent_load(self, reference) -> _Storage:
        """The numbers that a tensor refers to, read once each."""
        kind, name, key, _, count = reference
        if kind != "storage" or name not in _STORAGES or not isinstance(count, int) or not str(key).isdigit():
            raise NotPublished("a reference to something that is no tensor")
        if (name, key, count) in self._storages:
            return self._storages[name, key, count]
        dtype = _STORAGES[name]
        size = count * np.dtype(dtype).itemsize
        self._left -= size
        if count < 0 or self._left < 0:
            raise NotPublished(f"tensors of more than {MAX_TENSOR_BYTES >> 20} MiB")
        content = _member(self._archive, f"{self._folder}data/{key}", size)
        if len(content) != size:
            raise NotPublished(f"a tensor of {size} bytes with {len(content)} bytes of data")
        values = np.frombuffer(content, dtype=np.dtype(dtype).newbyteorder("<")).astype(dtype)
        self._storages[name, key, count] = _Storage(values)
        return self._storages[name, key, count]


def read_published_head(path: str | Path) -> PublishedHead:
    """Reads the tensors of a head in the published format: `torch.save` of a whole `__main__.reward_function` with
    fc1: Linear(h, 128) and fc2: Linear(128, 1). No code of the file is run, and what it claims about sizes is checked
    before anything is allocated.

    Raises:
        NotPublished: if it is anything else; if the file names something outside the fixed list, with that name.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickles) != 1:
                raise NotPublished("a zip file without a single data.pkl, which torch.save writes")
            folder = pickles[0].removesuffix("data.pkl")
            byteorder = f"{folder}byteorder"
            if byteorder in archive.namelist() and _member(archive, byteorder, 16) != b"little":
                raise NotPublished("big-endian tensors")
            file = io.BytesIO(_member(archive, pickles[0], MAX_PICKLE_BYTES))
            module = _Unpickler(file, archive, folder).load()
    except NotPublished:
        raise
    except (zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise NotPublished(f"no file of torch.save ({error})") from None
    except Exception as error:  # a damaged pickle can fail in any way, in code of the pickle module alone
        raise NotPublished(f"a damaged file of torch.save ({type(error).__name__}: {error})") from None
    return _tensors(module)


def _member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """A file of the archive, at most `limit` bytes, whatever its directory claims."""
    if name not in archive.NameToInfo:
        raise NotPublished(f"no {name} in it")
    with archive.open(name) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise NotPublished(f"{name} has more than {limit} bytes")
    return content


def _tensors(module) -> PublishedHead:
    try:
        layers = {name: vars(module)["_modules"][name] for name in ("fc1", "fc2")}
        tensors = PublishedHead(*(vars(layers[i])["_parameters"][j] for i in layers for j in ("weight", "bias")))
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
            raise TypeError("not tensors")
        hidden = tensors.fc1_weight.shape[1]
        shapes = [tuple(tensor.shape) for tensor in tensors]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise NotPublished(f"no fc1 and fc2 as the published heads have ({type(error).__name__}: {error})") from None
    expected = [(128, hidden), (128,), (1, 128), (1,)]
    if shapes != expected:
        raise NotPublished(f"expected tensors of shapes {expected}, found {shapes}")
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise NotPublished("weights that are not finite")
    return PublishedHead(*(tensor.float().clone() for tensor in tensors))
