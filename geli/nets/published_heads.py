"""Reads the published reward heads, which are `torch.save` files of a whole pickled module.

The file is loaded by torch's weights-only unpickler, with an inert stand-in for each module class. Before that, every
name in the pickle is compared with the names of a published head, because the unpickler also accepts names such as
`bytearray` that can allocate any amount of memory, and sizes are limited.
"""

import io
import pickletools
import zipfile
from pathlib import Path

import torch

MAX_PICKLE_BYTES = 1 << 20
MAX_ARCHIVE_BYTES = 1 << 28  # a published head has half a megabyte
MODULES = (
    "__main__.reward_function",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.activation.Tanh",
    "torch.nn.modules.dropout.Dropout",
)
NAMES = {
    *MODULES,
    *("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"),
    *("torch.FloatStorage", "torch.DoubleStorage", "torch.HalfStorage"),
    *("collections.OrderedDict", "builtins.set", "__builtin__.set"),
}


class NotPublished(ValueError):
    """The file is not a published head; the message says what was found instead."""


class _Module:
    """Stands for a module of the file: holds its state and has no behaviour."""


def read_published_head(path: str | Path) -> list[torch.Tensor]:
    """Weight and bias of fc1 and fc2 of a head r = tanh(fc2 relu(fc1 x)) in the published format: `torch.save` of a
    module `__main__.reward_function` with the layers fc1: Linear(hidden, 128) and fc2: Linear(128, 1). Nothing in the
    file is executed.

    For any other file raises `NotPublished`; if it names anything that a published head does not, with that name.
    """
    try:
        archive = _checked_copy(path)
        with torch.serialization.safe_globals([(_Module, name) for name in MODULES]):
            module = torch.load(archive, map_location="cpu", weights_only=True)
    except NotPublished:
        raise
    except Exception as error:  # a damaged file can fail in any way
        reason = (str(error).splitlines() or [""])[0]
        raise NotPublished(f"a damaged file, or none of torch.save ({type(error).__name__}: {reason[:200]})") from None
    return _tensors(module)


def _checked_copy(path: str | Path) -> io.BytesIO:
    """A copy of the archive after the checks of its sizes and names, so that torch reads exactly what was checked."""
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
        folder = source.namelist()[0].partition("/")[0]
        members = {member.filename: member for member in source.infolist()}
        if members[f"{folder}/data.pkl"].file_size > MAX_PICKLE_BYTES:
            raise NotPublished(f"data.pkl has more than {MAX_PICKLE_BYTES} bytes")
        if sum(member.file_size for member in members.values()) > MAX_ARCHIVE_BYTES:
            raise NotPublished(f"tensors of more than {MAX_ARCHIVE_BYTES >> 20} MiB")
        for name, member in members.items():
            if member.compress_type != zipfile.ZIP_STORED:
                raise NotPublished("a compressed archive, which torch.save does not write")
            target.writestr(name, source.read(member))
        _check_names(source.read(f"{folder}/data.pkl"))
    copy.seek(0)
    return copy


def _check_names(content: bytes) -> None:
    """Refuses a pickle that names anything but `NAMES`. torch refuses `STACK_GLOBAL`, which takes its name from the
    stack and which torch.save does not write; here it only gives the name for the message."""
    strings = ["", ""]
    for opcode, argument, _ in pickletools.genops(content):
        if isinstance(argument, str):
            strings.append(argument)
        if opcode.name not in ("GLOBAL", "STACK_GLOBAL"):
            continue
        name = argument.replace(" ", ".") if opcode.name == "GLOBAL" else ".".join(strings[-2:])
        if name not in NAMES:
            shown = name.encode("unicode_escape").decode()[:200]
            raise NotPublished(f"it names {shown}, which no published head does; nothing of it was run")


def _tensors(module) -> list[torch.Tensor]:
    try:
        layers = [module._modules[name]._parameters for name in ("fc1", "fc2")]
        tensors = [layer[name].detach() for layer in layers for name in ("weight", "bias")]
        shapes = [tuple(tensor.shape) for tensor in tensors]
        expected = [(128, shapes[0][1]), (128,), (1, 128), (1,)]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise NotPublished(f"no fc1 and fc2 as the published heads have ({type(error).__name__})") from None
    if shapes != expected or not all(tensor.is_contiguous() for tensor in tensors):  # a stride of 0 repeats numbers
        raise NotPublished(f"expected contiguous tensors of shapes {expected}, found {shapes}")
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise NotPublished("weights that are not finite")
    return [tensor.float().clone() for tensor in tensors]
