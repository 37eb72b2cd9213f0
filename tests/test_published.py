"""The published reward heads: a whole module pickled by torch.save, read without running anything of it."""

import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import SMALL_WIDTH, call_script, small_model

import models
from cli import UserError
from published import read_published_head

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
    subprocess.run([sys.executable, "-c", WRITER, str(path), str(SMALL_WIDTH)], check=True)
    return path


def test_it_gives_the_values_of_its_raw_tensors(published):
    tensors = torch.load(f"{published}.tensors", weights_only=True)
    features = torch.randn(7, SMALL_WIDTH)
    hidden = torch.relu(features @ tensors["fc1.weight"].T + tensors["fc1.bias"])
    expected = torch.tanh(hidden @ tensors["fc2.weight"].T + tensors["fc2.bias"])
    head = models.load_reward_head(published)
    assert not head.training and head.config.encoder is None
    torch.testing.assert_close(head(features), expected, atol=1e-6, rtol=0)


def test_nothing_of_torch_unpickles_it(published, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", fail)
    monkeypatch.setattr(pickle, "load", fail)
    assert models.load_reward_head(published).config.hidden == SMALL_WIDTH


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def repacked(published, path, **members):
    """The fixture with some of its members replaced."""
    with zipfile.ZipFile(published) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, members.get(name.split("/", 1)[1].replace(".", "_"), source.read(name)))
    return path


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("open({!r}, 'w')",), "builtins.eval"),
        (subprocess.Popen, (["touch", "{}"],), "subprocess.Popen"),
        (getattr, (torch.nn.Linear, "forward"), "builtins.getattr"),
        (torch.load, ("{}",), "torch.serialization.load"),
    ],
)
def test_a_file_that_names_anything_else_is_refused_and_nothing_runs(published, tmp_path, function, arguments, named):
    sign = tmp_path / "ran"
    filled = [a.format(str(sign)) if isinstance(a, str) else a for a in arguments]
    if isinstance(filled[0], list):
        filled[0][1] = str(sign)
    path = repacked(published, tmp_path / "reward1_bad", data_pkl=pickle.dumps(Call(function, *filled), 4))
    with pytest.raises(UserError, match=f"refused: it names {named}"):
        models.load_reward_head(path)
    assert not sign.exists()


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * (1 << 28))
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p, out: repacked(p, out, data_pkl=pickle.dumps({"a": 1}, 2)), "no fc1 and fc2"),
        (lambda p, out: repacked(p, out, data_pkl=b"\x80\x02garbage"), "no file of torch.save|damaged"),
        (lambda p, out: repacked(p, out, **{"data/0": b"short"}), "with 5 bytes of data"),
        (lambda p, out: repacked(p, out, **{"data/1": b"\0\0\x80\x7f" * 128}), "not finite"),
        (lambda p, out: bomb(out), "more than 1048576 bytes"),
        (lambda p, out: out.write_bytes(p.read_bytes()[:2000]) and out, "no file of torch.save"),
    ],
)
def test_damaged_and_absurd_files_are_refused(published, tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        models.load_reward_head(make(published, tmp_path / "reward1_bad"))


@pytest.mark.parametrize("size", [(1 << 40, 1), (128, 1 << 20), (-1, 4), (2, 2, 2)])
def test_absurd_shapes_are_refused_before_anything_is_allocated(published, tmp_path, size):
    class Storage:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, thing):
            if isinstance(thing, Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", 4096)
            return None

    stride = tuple(1 for _ in size)
    content = tmp_path / "pickle"
    with open(content, "wb") as file:
        tensor = Call(torch._utils._rebuild_tensor_v2, Storage(), 0, size, stride, False, {})
        Pickler(file, 2).dump(tensor)
    path = repacked(published, tmp_path / "reward1_bad", data_pkl=content.read_bytes())
    with pytest.raises(UserError, match=r"impossible shape|outside its storage|no head has"):
        models.load_reward_head(path)


def test_one_storage_named_many_times_is_not_copied_many_times(published, tmp_path):
    import tracemalloc

    import numpy

    class Storage:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, thing):
            return (
                ("storage", torch.FloatStorage, "0", "cpu", 128 * SMALL_WIDTH) if isinstance(thing, Storage) else None
            )

    storage, content = Storage(), tmp_path / "pickle"
    size = (128, SMALL_WIDTH)
    with open(content, "wb") as file:
        views = [
            Call(torch._utils._rebuild_tensor_v2, storage, 0, size, (SMALL_WIDTH, 1), False, {}) for _ in range(500)
        ]
        Pickler(file, 2).dump(views)
    path = repacked(published, tmp_path / "reward1_bad", data_pkl=content.read_bytes())
    tracemalloc.start()
    with pytest.raises(UserError, match="no fc1 and fc2"):
        models.load_reward_head(path)
    assert tracemalloc.get_traced_memory()[1] < 500 * numpy.prod(size) * 4 / 10
    tracemalloc.stop()


def test_raw_tensors_have_the_published_shapes(published):
    shapes = [tuple(tensor.shape) for tensor in read_published_head(published)]
    assert shapes == [(128, SMALL_WIDTH), (128,), (1, 128), (1,)]


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


def test_it_can_be_evaluated_and_trained_from_and_used_in_stage_3(folders, sample, tiny):
    data = ["--data_dir", sample, "--output_dir", folders]
    run = call_script("train_reward_GELI.py", "--val", "--reward_path", "eager-glade-5", "--run_name", "seen", *data)
    assert "Stage 2 (GELI, RRD), run seen" in run.stdout
    more = ["--epochs", 1, "--train_size", 4, "--small_model_shrink", "--run_name", "further"]
    call_script("train_reward_GELI.py", "--train", "--affect_path", "devout-brook-114", *more, *data)
    options = ["--model_name", tiny / "llama", "--val", "--train", "--ppo_off", "--steps", 1, "--batch_size", 2]
    options += ["--val_prompts", 2, "--context_turns", 2, "--reward_path", "eager-glade-5"]
    run = call_script("train_rl_GELI.py", *options, *data)
    assert "reward1_eager-glade-5 (stage 2, RRD, LI from the face, overall_affect)" in run.stdout


def test_its_encoder_is_the_named_one_else_the_published_one_else_an_error(folders, published, sample, tmp_path):
    path = next(folders.glob("visual*/reward1_eager-glade-5"))
    head = models.load_reward_head(path)
    assert models.encoder_of_head(head, path).endswith("/lang_model_devout-brook-114")
    own = next(folders.glob("SINGLE*/reward1_devout-brook-114"))
    assert models.encoder_of_head(models.load_reward_head(own), own) == str(own.parent / "lang_model_devout-brook-114")
    named = small_model("bart", tmp_path / "named", sample)
    assert models.load_encoder_of_head(head, path, 1024, str(named)).name == str(named)
    with pytest.raises(UserError, match="does not record its encoder: expected lang_model_devout-brook-114/"):
        models.encoder_of_head(models.load_reward_head(published), published)
