"""The published reward heads: a whole module pickled by torch.save, read without executing anything of it."""

import os
import pickle
import re
import shutil
import subprocess
import sys
import tracemalloc
import zipfile

import pytest
import torch
from conftest import call_script, small_model

from geli.heads import encoder_of_head, load_encoder_of_head, load_reward_head
from geli.nets.published_heads import NotPublished, read_published_head
from geli.run.errors import UserError

WIDTH = 32
# what the published training script did, in a process of its own so that the class is pickled from `__main__`
WRITER = """
import sys, torch
class reward_function(torch.nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.fc1, self.relu = torch.nn.Linear(hidden, 128), torch.nn.ReLU()
        self.fc2, self.tanh = torch.nn.Linear(128, 1), torch.nn.Tanh()
        self.dropout = torch.nn.Dropout(0.2)
torch.manual_seed(3)
head = reward_function(int(sys.argv[2]))
torch.save(head, sys.argv[1])
torch.save(dict(head.state_dict()), sys.argv[1] + ".tensors")
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    path = tmp_path_factory.mktemp("published") / "reward1_eager-glade-5"
    subprocess.run([sys.executable, "-c", WRITER, str(path), str(WIDTH)], check=True)
    return path


def test_it_has_the_tensors_of_the_module(published):
    expected = torch.load(f"{published}.tensors", weights_only=True)
    head = read_published_head(published)
    assert list(expected) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(head, expected.values(), strict=True))
    assert not any(tensor.requires_grad for tensor in head)
    assert [tuple(tensor.shape) for tensor in head] == [(128, WIDTH), (128,), (1, 128), (1,)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_are_converted_to_float32(tmp_path, dtype):
    writer = WRITER.replace("torch.save(head,", f"torch.save(head.to({dtype}),")
    subprocess.run([sys.executable, "-c", writer, str(tmp_path / "head"), str(WIDTH)], check=True)
    expected = torch.load(tmp_path / "head.tensors", weights_only=True)
    for a, b in zip(read_published_head(tmp_path / "head"), expected.values(), strict=True):
        assert torch.equal(a, b.float())


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Storage:
    """Pickles as a reference to the file's first storage."""


def dump(value, numbers: int = 128 * WIDTH) -> bytes:
    """A pickle as torch.save writes it, in which `Storage` objects are the first storage with so many numbers."""
    import io

    class Pickler(pickle._Pickler):
        def persistent_id(self, thing):
            return ("storage", torch.FloatStorage, "0", "cpu", numbers) if isinstance(thing, Storage) else None

    Pickler(file := io.BytesIO(), 2).dump(value)
    return file.getvalue()


def tensor(size, stride) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, Storage(), 0, size, stride, False, {})


def repacked(published, path, **members):
    """The published head with some members replaced: data_pkl, data/0, ..."""
    with zipfile.ZipFile(published) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, members.get(name.split("/", 1)[1].replace(".", "_"), source.read(name)))
    return path


# Each call leaves a trace: it makes the folder `{}`, or fails in a way that is not a refusal.
CALLS = {
    "posix.system": (os.system, ("mkdir {}",)),
    "posix.mkdir": (os.mkdir, ("{}",)),
    "builtins.eval": (eval, ("__import__('os').mkdir({!r})",)),
    "builtins.exec": (exec, ("import os; os.mkdir({!r})",)),
    "subprocess.Popen": (subprocess.Popen, (["mkdir", "{}"],)),
    "builtins.getattr": (getattr, (os, "mkdir")),
    "torch.serialization.load": (torch.load, ("{}",)),
    "builtins.bytearray": (bytearray, (1 << 20,)),  # torch's weights-only unpickler would allocate it
}


def calling(name: str, trace) -> Call:
    function, arguments = CALLS[name]
    fill = lambda value: value.format(str(trace)) if isinstance(value, str) else value  # noqa: E731
    filled = [[fill(v) for v in value] if isinstance(value, list) else fill(value) for value in arguments]
    return Call(function, *("os" if value is os else value for value in filled))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", CALLS)
def test_a_file_that_names_anything_else_is_refused_and_nothing_runs(published, tmp_path, name, protocol):
    path, trace = tmp_path / "reward1_bad", tmp_path / "trace"
    repacked(published, path, data_pkl=pickle.dumps(calling(name, trace), protocol, fix_imports=False))
    with pytest.raises(
        NotPublished, match=rf"^it names {re.escape(name)}, which no published head does; nothing of it was run"
    ):
        read_published_head(path)
    assert not trace.exists()


@pytest.mark.parametrize("name", [name for name, (_, arguments) in CALLS.items() if "mkdir" in str((name, arguments))])
def test_the_same_files_leave_a_trace_where_nothing_stops_them(tmp_path, name):
    if name == "builtins.getattr":
        return
    process = pickle.loads(pickle.dumps(calling(name, tmp_path / "trace"), 2))
    if isinstance(process, subprocess.Popen):
        process.wait()
    assert (tmp_path / "trace").exists()


def test_a_call_inside_a_sound_head_does_not_run(published, tmp_path):
    with zipfile.ZipFile(published) as archive:
        content = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    trace = str(tmp_path / "trace").encode()
    call = (
        b"cposix\nmkdir\nX" + len(trace).to_bytes(4, "little") + trace + b"\x85R0"
    )  # posix.mkdir(trace), result dropped
    path = repacked(published, tmp_path / "reward1_bad", data_pkl=content[:2] + call + content[2:])
    with pytest.raises(NotPublished, match=r"it names posix\.mkdir"):
        read_published_head(path)
    assert not (tmp_path / "trace").exists()


def compressed(published, path):
    with zipfile.ZipFile(published) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return path


def bomb(path, name, size):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in {"x/data.pkl": b"N.", name: b"\0" * size}.items():
            archive.writestr(member, content)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p, out: repacked(p, out, data_pkl=pickle.dumps({"a": 1}, 2)), "no fc1 and fc2"),
        (lambda p, out: repacked(p, out, data_pkl=b"\x80\x02garbage"), "a damaged file"),
        (lambda p, out: repacked(p, out, data_pkl=b"\x80\x02" + b"]" * 5000 + b"."), "no fc1 and fc2"),
        (lambda p, out: repacked(p, out, **{"data/0": b"short"}), r"record size \(5 bytes\) does not match"),
        (lambda p, out: repacked(p, out, **{"data/1": b"\0\0\x80\x7f" * 128}), "not finite"),
        (lambda p, out: bomb(out, "x/data.pkl", 1 << 26), "more than 1048576 bytes"),
        (lambda p, out: bomb(out, "x/data/0", (1 << 28) + 1), "more than 256 MiB"),
        (lambda p, out: compressed(p, out), "a compressed archive"),
        (lambda p, out: out.write_bytes(p.read_bytes()[:2000]) and out, "a damaged file"),
        (lambda p, out: out.write_bytes(b"PK\x03\x04") and out, "a damaged file"),
    ],
)
def test_damaged_and_absurd_files_are_refused(published, tmp_path, make, message):
    path = make(published, tmp_path / "reward1_bad")
    tracemalloc.start()
    try:
        with pytest.raises(NotPublished, match=message):
            read_published_head(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("size", "stride"),
    [
        ((1 << 40, 1), (1, 1)),
        ((128, 1 << 20), (1, 1)),
        ((-1, 4), (1, 1)),
        ((128, 1 << 31), (0, 0)),
        ((2, 2, 2), (1, 1, 1)),
    ],
)
def test_absurd_shapes_are_refused_before_anything_is_allocated(published, tmp_path, size, stride):
    layer = {"weight": tensor(size, stride), "bias": tensor((128,), (1,))}
    last = {"weight": tensor((1, 128), (128, 1)), "bias": tensor((1,), (1,))}
    content = head_pickle({"fc1": layer, "fc2": last})
    path = repacked(published, tmp_path / "reward1_bad", data_pkl=content)
    with pytest.raises(NotPublished, match=r"expected contiguous tensors|a damaged file"):
        read_published_head(path)


def head_pickle(layers: dict) -> bytes:
    """The pickle of a module with these parameters, as `__main__.reward_function` with parts of class Linear."""
    main, linear = b"c__main__\nreward_function\n", b"ctorch.nn.modules.linear\nLinear\n"

    def module(name: bytes, state: bytes) -> bytes:
        return name + b")\x81" + state + b"b"

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    parts = b"".join(
        text(name) + module(linear, b"}" + text("_parameters") + dump(parameters)[2:-1] + b"s") + b"s"
        for name, parameters in layers.items()
    )
    return b"\x80\x02" + module(main, b"}" + text("_modules") + b"}" + parts + b"s") + b"."


def test_the_hand_made_pickle_of_sound_shapes_is_read(published, tmp_path):
    layers = {
        "fc1": {"weight": tensor((128, WIDTH), (WIDTH, 1)), "bias": tensor((128,), (1,))},
        "fc2": {"weight": tensor((1, 128), (128, 1)), "bias": tensor((1,), (1,))},
    }
    path = repacked(published, tmp_path / "reward1_made", data_pkl=head_pickle(layers))
    assert torch.equal(read_published_head(path)[0], read_published_head(published)[0])


def test_one_storage_named_many_times_is_not_copied_many_times(published, tmp_path):
    content = dump([tensor((128, WIDTH), (WIDTH, 1)) for _ in range(500)])
    path = repacked(published, tmp_path / "reward1_bad", data_pkl=content)
    tracemalloc.start()
    try:
        with pytest.raises(NotPublished, match="no fc1 and fc2"):
            read_published_head(path)
        assert tracemalloc.get_traced_memory()[1] < 500 * 128 * WIDTH * 4 / 4
    finally:
        tracemalloc.stop()


def test_the_archives_that_are_read_are_the_ones_that_were_checked(published, tmp_path):
    """A second archive behind the first one, which other readers of zip files might prefer, changes nothing."""
    path = tmp_path / "reward1_two"
    path.write_bytes(published.read_bytes() + bomb(tmp_path / "other", "x/data/0", 100).read_bytes())
    with pytest.raises(NotPublished):
        read_published_head(path)


# ---------------------------------------------------------------------------------------------------------------------
# Published heads as reward heads: `geli.heads.load_reward_head`, their encoder, the commands


def test_its_rewards_are_those_of_its_raw_tensors(published):
    tensors = torch.load(f"{published}.tensors", weights_only=True)
    features = torch.randn(7, WIDTH)
    hidden = torch.relu(features @ tensors["fc1.weight"].T + tensors["fc1.bias"])
    expected = torch.tanh(hidden @ tensors["fc2.weight"].T + tensors["fc2.bias"])
    head = load_reward_head(published)
    assert not head.training and head.config.encoder is None and head.config.hidden == WIDTH
    assert head.config.head == "published"
    torch.testing.assert_close(head(features), expected, atol=1e-6, rtol=0)


def test_a_refused_file_is_a_users_error_with_its_path(published, tmp_path):
    path = repacked(published, tmp_path / "reward1_bad", data_pkl=pickle.dumps(calling("posix.system", "x"), 2))
    with pytest.raises(UserError, match=rf"{path}: expected a reward head, refused: it names posix\.system"):
        load_reward_head(path)


@pytest.fixture(scope="module")
def folders(published, sample, tmp_path_factory):
    """An output folder as its user lays it out: the published head, and the published encoder in stage 1's folder."""
    out = tmp_path_factory.mktemp("out")
    geli = out / "visual_feedback_baselines_convo_overall_affect_baseline_RRD_K_160"
    li = out / (
        "SINGLE_INDEX_reward_function_convo_overall_affect_contra_False_shrink_False"
        "_curriculum_False_curriculum_exposureFalse"
    )
    geli.mkdir()
    shutil.copy(published, geli / "reward1_eager-glade-5")
    small_model("bart", li / "lang_model_devout-brook-114", sample)
    shutil.copy(published, li / "reward1_devout-brook-114")
    return out


@pytest.mark.slow
def test_it_can_be_evaluated_and_trained_from_and_used_in_stage_3(folders, sample, tiny):
    data = ["--data_dir", sample, "--output_dir", folders]
    run = call_script("train_reward_GELI.py", "--val", "--reward_path", "eager-glade-5", "--run_name", "seen", *data)
    assert "Stage 2 (GELI, RRD), run seen" in run.stdout
    more = ["--epochs", 1, "--train_size", 4, "--small_model_shrink", "--run_name", "further"]
    call_script("train_reward_GELI.py", "--train", "--affect_path", "devout-brook-114", *more, *data)
    assert load_reward_head(next(folders.glob("*/reward1_further"))).config.head == "small_model_shrink"
    options = ["--model_name", tiny / "llama", "--val", "--train", "--ppo_off", "--steps", 1, "--batch_size", 2]
    options += ["--val_prompts", 2, "--context_turns", 2, "--reward_path", "eager-glade-5"]
    run = call_script("train_rl_GELI.py", *options, *data)
    assert "reward1_eager-glade-5 (stage 2, RRD, LI from the face, overall_affect)" in run.stdout


def test_its_encoder_is_the_named_one_else_the_published_one_else_an_error(folders, published, sample, tmp_path):
    path = next(folders.glob("visual*/reward1_eager-glade-5"))
    head = load_reward_head(path)
    assert encoder_of_head(head.config, path).endswith("/lang_model_devout-brook-114")
    own = next(folders.glob("SINGLE*/reward1_devout-brook-114"))
    assert encoder_of_head(load_reward_head(own).config, own) == str(own.parent / "lang_model_devout-brook-114")
    named = small_model("bart", tmp_path / "named", sample)
    assert load_encoder_of_head(head.config, path, 1024, str(named)).name == str(named)
    with pytest.raises(UserError, match="does not record its encoder: expected lang_model_devout-brook-114/"):
        encoder_of_head(load_reward_head(published).config, published)
