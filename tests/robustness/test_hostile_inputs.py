"""Files that come from elsewhere and mean harm: each is answered in one line, and nothing of theirs runs.

`python tests/robustness/test_hostile_inputs.py > docs/hostile_inputs.md` writes what was tried, and the answers.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

if __name__ == "__main__":
    root = Path(__file__).parent.parent.parent
    sys.path[:0] = [str(root), str(root / "tests")]

import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator
from conftest import call_script, small_model
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_reward_LI_only
from data_utils import read_corpus
from geli.data.cache import CHECKSUM_BYTES
from geli.heads import encoder_of_head, load_encoder_of_head, load_reward_head, save_reward_head
from geli.nets.encoder import load_encoder
from geli.nets.features import FeatureCache, weights_digest
from geli.nets.options import Adapter
from geli.nets.policy import load_policy
from geli.report.checks import conversations_seen
from geli.run import errors
from geli.run.checkpoint import Checkpointer
from geli.run.distributed import make_accelerator
from geli.run.options import RunOptions, file_name
from geli.run.tracking import Tracker
from models import RewardHead, RewardHeadConfig
from tools import convert_corpus, sample_candor

# ---------------------------------------------------------------------------------------------------------------------
# Sound files, which the cases spoil


def make_kit(folder: Path) -> SimpleNamespace:
    """A corpus, small models, an adapter, a policy's checkpoint and a reward head; all sound."""
    sample_candor.write_corpus(folder / "candor", conversations=12, n_turns=14, seed=0)
    for kind in ("bart", "llama", "llama-encoder"):
        small_model(kind, folder / kind, folder / "candor")
    load_encoder(str(folder / "llama-encoder"), adapt=True).save(folder / "adapter")
    load_policy(str(folder / "llama"), Adapter(16, 32), torch.float32).save(folder / "checkpoint")
    config = RewardHeadConfig("small_model_shrink", 32, "../bart", True, 256, 3, 1, "overall_affect")
    save_reward_head(RewardHead(config), folder / "heads" / "reward1_x")
    names = ("candor", "bart", "llama", "llama-encoder", "adapter", "checkpoint")
    return SimpleNamespace(**{n.replace("-", "_"): folder / n for n in names}, head=folder / "heads" / "reward1_x")


class Payload:
    """Pickles as a command that makes the canary."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def change(path: Path, **values) -> None:
    """Changes entries of a JSON file; of a file that is missing, makes it."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**known, **values}))


def rewrite(path: Path, tensors: dict | None = None, config: dict | None = None, text: str | None = None) -> Path:
    """Changes a saved head's tensors, entries of its configuration, or its whole configuration."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    if config:
        metadata["config"] = json.dumps({**json.loads(metadata["config"]), **config})
    metadata["config"] = text or metadata["config"]
    save_file({**load_file(path), **(tensors or {})}, path, metadata=metadata)
    return path


DEEP = "[" * 100_000 + "]" * 100_000
ABSURD_HEADER = struct.pack("<Q", 1 << 62) + b"{}"
ABSURD_SHAPE = b'{"x":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}'
ABSURD_TENSOR = struct.pack("<Q", len(ABSURD_SHAPE)) + ABSURD_SHAPE + b"\0\0\0\0"


# ---------------------------------------------------------------------------------------------------------------------
# The cases: (kit, an empty folder, the canary) -> what a command would do with the file


def head(spoil: Callable) -> Callable:
    """A case of a reward head, spoiled by (path, canary)."""

    def case(kit, out, canary):
        shutil.copy(kit.head, out / "reward1_x")
        spoil(out / "reward1_x", canary)

        def use():
            found = load_reward_head(out / "reward1_x")
            load_encoder_of_head(found.config, out / "reward1_x", 256, None)

        return use

    return case


def folder(kind: str, load: Callable, spoil: Callable) -> Callable:
    """A case of a folder of the kit, copied, spoiled by (folder, canary), and loaded."""

    def case(kit, out, canary):
        shutil.copytree(getattr(kit, kind), out / kind)
        spoil(out / kind, canary)
        return lambda: load(kit, out / kind)

    return case


def encoder(spoil: Callable) -> Callable:
    """A case of an encoder's folder."""
    return folder("bart", lambda _, path: load_encoder(str(path)), spoil)


def adapter(spoil: Callable) -> Callable:
    """A case of an encoder's adapter."""
    return folder("adapter", lambda _, path: load_encoder(str(path)), spoil)


def policy(spoil: Callable) -> Callable:
    """A case of a language model's folder."""
    return folder("llama", lambda _, path: load_policy(str(path), Adapter(16, 32), torch.float32), spoil)


def policy_checkpoint(spoil: Callable) -> Callable:
    """A case of what `--val` without `--train` loads."""
    load = lambda kit, path: load_policy(str(kit.llama), Adapter(16, 32), torch.float32).load(path)  # noqa: E731
    return folder("checkpoint", load, spoil)


def record(content: str) -> Callable:
    """A case of the record beside a stage-1 head."""

    def case(kit, out, canary):
        shutil.copy(kit.head, out / "reward1_x")
        (out / "reward1_x.json").write_text(content)
        return lambda: conversations_seen(out / "reward1_x", load_reward_head(out / "reward1_x").config)

    return case


def casino(content: str) -> Callable:
    """A case of CaSiNo's JSON."""

    def case(kit, out, canary):
        for part in ("train", "valid", "test"):
            (out / f"casino_{part}.json").write_text(content if part == "train" else "[]")

        def use():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["convert_corpus.py", "casino", str(out), str(out / "made")])
                convert_corpus.main()

        return use

    return case


def dialogue(**changes) -> str:
    """CaSiNo's JSON of one dialogue."""
    people = {name: {"outcomes": {}} for name in ("a", "b")}
    said = [{"id": "a", "text": "hello"}, {"id": "b", "text": "hi"}]
    return json.dumps([{"dialogue_id": 1, "participant_info": people, "chat_logs": said, **changes}])


def data(spoil: Callable) -> Callable:
    """A case of a conversation's folder, spoiled by (folder, canary)."""

    def case(kit, out, canary):
        shutil.copytree(kit.candor, out / "candor")
        spoil(sorted(path for path in (out / "candor").iterdir() if path.is_dir())[0], canary)
        return lambda: print(read_corpus(out / "candor", "overall_affect").describe())

    return case


def conversation_cache(spoil: Callable) -> Callable:
    """A case of a cache of conversations with a right checksum, whose table is spoiled."""

    def case(kit, out, canary):
        read_corpus(kit.candor, "overall_affect", cache=out)
        path = next(out.glob("*.cache"))
        table = parquet.read_table(pa.BufferReader(path.read_bytes()[CHECKSUM_BYTES:]))
        table = spoil(table).cast(table.schema)
        content = pa.BufferOutputStream()
        parquet.write_table(table, content, compression="zstd")
        content = content.getvalue().to_pybytes()
        path.write_bytes(hashlib.sha256(content).digest() + content)
        return lambda: read_corpus(kit.candor, "overall_affect", cache=out)

    return case


def column(name: str, value) -> Callable:
    """Gives every row of a table this value in a column."""

    def spoil(table):
        place = table.schema.get_field_index(name)
        values = pa.array([value] * len(table), table.schema.field(name).type)
        return table.set_column(place, table.schema.field(name), values)

    return spoil


def feature_cache(spoil: Callable) -> Callable:
    """A case of cached features with a right checksum, whose tensors are spoiled."""

    def case(kit, out, canary):
        encoder = load_encoder(str(kit.bart))
        pairs, kept = (
            encoder.tokenize([(" User: hi", "AI: hello")]),
            FeatureCache(out, "key", encoder.hidden_size),
        )
        kept.encode(pairs, encoder.encode)
        path = next((out / "key").iterdir())
        tensors = spoil(load_file(path))
        save_file(tensors, path, metadata={"checksum": weights_digest(tensors, "key")})
        return lambda: kept.encode(pairs, encoder.encode)

    return case


def checkpoint_of_run(spoil: Callable) -> Callable:
    """A case of a checkpoint that `--resume` would restore, spoiled by (path, canary)."""

    def case(kit, out, canary):
        head = torch.nn.Linear(2, 1)
        run = Checkpointer(
            SimpleNamespace(folder=out / "state_x"), Accelerator(cpu=True), modules={"head": head},
            optimizer=torch.optim.SGD(head.parameters()), values={}, generators={}, inputs={}, every=10, total=10,
        )  # fmt: skip
        run.done(3, save=True)
        spoil(out / "state_x" / "step_00000003.pt", canary)
        return run.restore

    return case


def with_entries(**changes) -> Callable:
    """A checkpoint in which some entries are something else."""
    return lambda path, canary: torch.save({**torch.load(path, weights_only=True), **changes}, path)


def with_payload(path, canary):
    """A checkpoint with a command in its pickle."""
    torch.save({**torch.load(path, weights_only=True), "more": Payload(canary)}, path)


def cut(path, canary):
    """A file without its last byte."""
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path, canary):
    """A file with one other byte."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def pickled(name: str, instead_of: str) -> Callable:
    """Puts a pickle that runs a command in place of a file."""

    def spoil(path, canary):
        (path / instead_of).unlink()
        (path / name).write_bytes(pickle.dumps(Payload(canary)))

    return spoil


def saved_by_torch(name: str, instead_of: str, compression: int = zipfile.ZIP_STORED) -> Callable:
    """Puts what `torch.save` writes, with a command in its pickle, in place of a file."""

    def spoil(path, canary):
        (path / instead_of).unlink()
        torch.save({"a": torch.zeros(2), "b": Payload(canary)}, path / "stored")
        with zipfile.ZipFile(path / "stored") as source, zipfile.ZipFile(path / name, "w", compression) as target:
            for member in source.namelist():
                target.writestr(member, source.read(member))
        (path / "stored").unlink()

    return spoil


def own_code(file: str, entry: str, reference: str = "modeling_x.Model") -> Callable:
    """Adds code, and the entry of a JSON file that names it."""

    def spoil(path, canary):
        (path / "modeling_x.py").write_text(f"open({str(canary)!r}, 'w')\nclass Model: pass\n")
        change(path / file, auto_map={entry: [reference, reference] if entry == "AutoTokenizer" else reference})

    return spoil


def module_import(**values) -> Callable:
    """Adds a module to Python's path that makes the canary, and settings of an adapter that name it."""

    def spoil(path, canary):
        (path.parent / "evil_module.py").write_text(f"open({str(canary)!r}, 'w')\n")
        sys.path.insert(0, str(path.parent))
        change(path / "adapter_config.json", **values)

    return spoil


def zip_bomb(path, canary):
    """An archive whose pickle unpacks to 256 MiB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * (1 << 28))


def torch_archive(path, canary):
    """A published head's archive whose pickle runs a command."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(Payload(canary), 2))


def write(name: str, content: str | bytes) -> Callable:
    """Replaces a file of a folder."""
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda path, canary: (path / name).write_bytes(raw)


def entries(name: str, **values) -> Callable:
    """Changes entries of a JSON file of a folder."""
    return lambda path, canary: change(path / name, **values)


def not_finite(name: str) -> Callable:
    """Makes the weights in a safetensors file NaN."""

    def spoil(path, canary):
        save_file({key: t * float("nan") for key, t in load_file(path / name).items()}, path / name)

    return spoil


def more_tokens(path: Path) -> dict:
    """The model of a folder's tokenizer.json, with a token more, of an id far away."""
    model = json.loads((path / "tokenizer.json").read_text())["model"]
    return {**model, "vocab": {**model["vocab"], "hello": 10**9}}


def index_of(place: str) -> Callable:
    """Replaces the weights by an index that names a file elsewhere."""

    def spoil(path, canary):
        shutil.move(path / "model.safetensors", path.parent / "elsewhere.safetensors")
        names = load_file(path.parent / "elsewhere.safetensors")
        change(path / "model.safetensors.index.json", metadata={}, weight_map=dict.fromkeys(names, place))

    return spoil


def pickled_csv(path, canary):
    """A transcript that is a pickle."""
    (path / "transcription" / "transcript_cliffhanger.csv").write_bytes(pickle.dumps(Payload(canary)))


def never_ending(path, canary):
    """A transcript that is a device without an end."""
    (path / "transcription" / "transcript_cliffhanger.csv").unlink()
    (path / "transcription" / "transcript_cliffhanger.csv").symlink_to("/dev/zero")


def pipe(path, canary):
    """A survey that is a pipe to which nobody writes."""
    (path / "survey.csv").unlink()
    os.mkfifo(path / "survey.csv")


def speaking_name(path, canary):
    """A broken conversation whose folder's name would clear the terminal and forge a line."""
    shutil.rmtree(path)
    (path.parent / "\x1b[2Jx\nReward head: fine").mkdir()


class Case(NamedTuple):
    """What is tried.

    Attributes:
        file: what kind of file it is. tried: what is wrong with it. make: see above.
        answer: a part of the answer. refused: else the file is not used, which the run says and goes on; an empty
            answer means that it is loaded, and what was tried has no effect.
    """

    file: str
    tried: str
    make: Callable
    answer: str
    refused: bool = True


def tensor(name: str, value) -> Callable:
    """Replaces a tensor of a head."""
    return lambda path, canary: rewrite(path, tensors={name: value})


def setting(**values) -> Callable:
    """Changes entries of a head's configuration."""
    return lambda path, canary: rewrite(path, config=values)


def whole(content: bytes) -> Callable:
    """Replaces a whole file."""
    return lambda path, canary: path.write_bytes(content)


CONFIG, ADAPTER = "config.json", "adapter_config.json"
CASES = [
    Case("reward head", "a published head's archive whose pickle calls os.system", head(torch_archive), "posix.system"),
    Case("reward head", "a bare pickle that calls os.system",
         head(lambda path, canary: path.write_bytes(pickle.dumps(Payload(canary)))), "expected a reward head"),
    Case("reward head", "an archive that unpacks to 256 MiB", head(zip_bomb), "more than 1048576 bytes"),
    Case("reward head", "a header of 2**62 bytes", head(whole(ABSURD_HEADER)), "expected a reward head"),
    Case("reward head", "a tensor of 2**40 numbers in 4 bytes", head(whole(ABSURD_TENSOR)), "expected a reward head"),
    Case("reward head", "hidden=10**12, which would allocate petabytes", head(setting(hidden=10**12)),
         "less than 2**31"),
    Case("reward head", "hidden=10**9", head(setting(hidden=10**9)), "expected {'layers.0.weight': (128, 1000000000)"),
    Case("reward head", "hidden=10**30", head(setting(hidden=10**30)), "less than 2**31"),
    Case("reward head", "a configuration nested 100,000 deep",
         head(lambda path, canary: rewrite(path, text=f'["geli-reward-head-1", {DEEP}]')),
         "does not fit its own configuration"),
    Case("reward head", "a kind of head that is no head", head(setting(head="os.system")), "head: unknown"),
    Case("reward head", "a list where a number belongs",
         head(setting(context_turns=[1])), "context_turns: expected int"),
    Case("reward head", "weights that are not numbers",
         head(tensor("layers.0.bias", torch.full((128,), float("nan")))), "not finite"),
    Case("reward head", "its encoder is /etc", head(setting(encoder="/etc")), "relative to the head's, found /etc"),
    Case("reward head", "its encoder's folder is not there",
         head(setting(encoder="lang_model_gone")), "no such folder"),
    Case("reward head", "its encoder is a hub id that is not on this machine",
         head(setting(encoder="somebody/model", encoder_is_folder=False)), "does not make this program fetch one"),
    Case("reward head", "its encoder's hub id is a path",
         head(setting(encoder="../../x", encoder_is_folder=False)), "expected a hub id or an existing folder"),
    Case("reward head", "its encoder's name clears the terminal",
         head(setting(encoder="\x1b[2Jx")), "expected a hub id or a folder"),
    Case("encoder folder", "pytorch_model.bin: a bare pickle that calls os.system",
         encoder(pickled("pytorch_model.bin", "model.safetensors")), "hold more than tensors"),
    Case("encoder folder", "pytorch_model.bin: torch.save's archive whose pickle calls os.system",
         encoder(saved_by_torch("pytorch_model.bin", "model.safetensors")), "hold more than tensors"),
    Case("encoder folder", "pytorch_model.bin: a compressed archive",
         encoder(saved_by_torch("pytorch_model.bin", "model.safetensors", zipfile.ZIP_DEFLATED)), "compressed archive"),
    Case("encoder folder", "config.json names code beside it (auto_map)",
         encoder(own_code(CONFIG, "AutoModel")), "names code of its own"),
    Case("encoder folder", "config.json names code for a library's own kind of configuration",
         encoder(own_code(CONFIG, "AutoConfig")), "names code of its own"),
    Case("encoder folder", "config.json names code of another repository",
         encoder(own_code(CONFIG, "AutoModel", "somebody/model--modeling_x.Model")), "names code of its own"),
    Case("encoder folder", "tokenizer_config.json names code (auto_map)",
         encoder(own_code("tokenizer_config.json", "AutoTokenizer")), "names code of its own"),
    Case("encoder folder", "config.json asks for an attention kernel from the hub",
         encoder(entries(CONFIG, attn_implementation="somebody/kernel")), "asks for a kernel from the hub"),
    Case("encoder folder", "d_model=10**9", encoder(entries(CONFIG, d_model=10**9)), "nothing was allocated"),
    Case("encoder folder", "d_model=4096 over weights of 72,192 numbers",
         encoder(entries(CONFIG, d_model=4096)), "nothing was allocated"),
    Case("encoder folder", "vocab_size=10**10", encoder(entries(CONFIG, vocab_size=10**10)), "nothing was allocated"),
    Case("encoder folder", "encoder_layers=10**9",
         encoder(entries(CONFIG, encoder_layers=10**9)), "encoder_layers: expected at most 1,000"),
    Case("encoder folder", "num_labels=10**9", encoder(entries(CONFIG, num_labels=10**9)), "expected at most 100,000"),
    Case("encoder folder", "one layer more than its weights have",
         encoder(entries(CONFIG, encoder_layers=3)), "its weights lack 16"),
    Case("encoder folder", "encoder_attention_heads=0",
         encoder(entries(CONFIG, encoder_attention_heads=0)), "could not be loaded"),
    Case("encoder folder", "d_model is text", encoder(entries(CONFIG, d_model="x")), "could not be loaded"),
    Case("encoder folder", "config.json nested 100,000 deep", encoder(write(CONFIG, DEEP)), "expected JSON"),
    Case("encoder folder", "a setting nested 900 deep",
         encoder(entries(CONFIG, d_model=json.loads(DEEP[99_100:100_900]))), "could not be loaded"),
    Case("encoder folder", "a number of 400 digits",
         encoder(entries(CONFIG, d_model=10**400)), "d_model: expected at most"),
    Case("encoder folder", "config.json is a list", encoder(write(CONFIG, "[]")), "expected a JSON object, found list"),
    Case("encoder folder", "an unknown kind of model", encoder(entries(CONFIG, model_type="x")), "could not be loaded"),
    Case("encoder folder", "model.safetensors with a header of 2**62 bytes",
         encoder(write("model.safetensors", ABSURD_HEADER)), "expected a safetensors file"),
    Case("encoder folder", "an index that names weights outside the folder",
         encoder(index_of("../elsewhere.safetensors")), "expected one beside it"),
    Case("encoder folder", "an index that names /etc/passwd",
         encoder(index_of("/etc/passwd")), "names the file '/etc/passwd'"),
    Case("tokenizer", "tokenizer.json is a pickle",
         encoder(pickled("tokenizer.json", "tokenizer.json")), "could not be loaded"),
    Case("tokenizer", "tokenizer.json nested 100,000 deep",
         encoder(write("tokenizer.json", DEEP)), "could not be loaded"),
    Case("tokenizer", "tokenizer_config.json is a list",
         encoder(write("tokenizer_config.json", "[]")), "expected a JSON object, found list"),
    Case("tokenizer", "model_max_length is text",
         encoder(entries("tokenizer_config.json", model_max_length="x")), "model_max_length"),
    Case("tokenizer", "an id far beyond its model's embeddings",
         encoder(lambda path, _: change(path / "tokenizer.json", model=more_tokens(path))), "its model has 400"),
    Case("adapter", "auto_mapping names a module to import",
         adapter(module_import(auto_mapping={"base_model_class": "X", "parent_library": "evil_module"})),
         "sets auto_mapping"),
    Case("adapter", "megatron_core names a module to import",
         adapter(module_import(megatron_config={"a": 1}, megatron_core="evil_module")), "sets megatron_co"),
    Case("adapter", "layer_replication=[[0, 10**9]]",
         adapter(entries(ADAPTER, layer_replication=[[0, 10**9]])), "sets layer_replication"),
    Case("adapter", "eva_config", adapter(entries(ADAPTER, eva_config={"rho": 2.0})), "sets eva_config"),
    Case("adapter", "an initialisation that reads files", adapter(entries(ADAPTER, init_lora_weights="corda")),
         "sets init_lora_weights to 'corda'"),
    Case("adapter", "r=10**9", adapter(entries(ADAPTER, r=10**9)), "expected the rank of its weights"),
    Case("adapter", "target_modules is a pattern that takes forever",
         adapter(entries(ADAPTER, target_modules="(a+)+$")), "expected a list of names of modules"),
    Case("adapter", "another kind of adapter",
         adapter(entries(ADAPTER, peft_type="PROMPT_TUNING")), "expected a LoRA adapter"),
    Case("adapter", "its model is a hub id that is not on this machine",
         adapter(entries(ADAPTER, base_model_name_or_path="somebody/model")), "does not make this program fetch one"),
    Case("adapter", "its model is a path that is not there",
         adapter(entries(ADAPTER, base_model_name_or_path="../../x")), "expected a hub id or an existing folder"),
    Case("adapter", "adapter_model.bin, a pickle that calls os.system",
         adapter(pickled("adapter_model.bin", "adapter_model.safetensors")), "expected adapter_model.safetensors"),
    Case("adapter", "weights that are not numbers", adapter(not_finite("adapter_model.safetensors")), "not finite"),
    Case("adapter", "one weight is missing", adapter(lambda path, _: save_file(
        dict(list(load_file(path / "adapter_model.safetensors").items())[1:]), path / "adapter_model.safetensors")),
        "tensors are not the"),
    Case("policy folder", "pytorch_model.bin: a bare pickle that calls os.system",
         policy(pickled("pytorch_model.bin", "model.safetensors")), "hold more than tensors"),
    Case("policy folder", "config.json names code beside it (auto_map)",
         policy(own_code(CONFIG, "AutoModelForCausalLM")), "names code of its own"),
    Case("policy folder", "hidden_size=10**9", policy(entries(CONFIG, hidden_size=10**9)), "nothing was allocated"),
    Case("policy folder", "an adapter_config.json that brings a model from elsewhere",
         policy(entries(ADAPTER, base_model_name_or_path="somebody/model", peft_type="LORA")), "found an adapter"),
    Case("policy folder", "code to generate with (custom_generate/generate.py)",
         policy(lambda path, canary: ((path / "custom_generate").mkdir(), (path / "custom_generate" / "generate.py")
                                      .write_text(f"open({str(canary)!r}, 'w')\n"))), "", False),
    Case("policy folder", "a chat template that reaches for os.system",
         policy(lambda path, canary: (path / "chat_template.jinja").write_text(
             "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}")), "", False),
    Case("policy checkpoint", "megatron_core names a module to import",
         policy_checkpoint(module_import(megatron_config={"a": 1}, megatron_core="evil_module")), "sets megatron_co"),
    Case("policy checkpoint", "adapter_model.bin, a pickle that calls os.system",
         policy_checkpoint(pickled("adapter_model.bin", "adapter_model.safetensors")),
         "expected adapter_model.safetensors"),
    Case("policy checkpoint", "value_head.safetensors is a pickle",
         policy_checkpoint(pickled("value_head.safetensors", "value_head.safetensors")), "not an adapter that fits"),
    Case("policy checkpoint", "weights that are not numbers",
         policy_checkpoint(not_finite("adapter_model.safetensors")), "not finite"),
    Case("policy checkpoint", "a value head that is not numbers",
         policy_checkpoint(not_finite("value_head.safetensors")), "not finite"),
    Case("run record", "no JSON", record("x"), "expected JSON"),
    Case("run record", "nested 100,000 deep", record(DEEP), "expected JSON"),
    Case("run record", "metrics is a number", record('{"metrics": 1}'), "expected the record of a run"),
    Case("run record", "training_conversations is a number",
         record('{"metrics": {"steps": 1}, "training_conversations": 1}'), "expected the record of a run"),
    Case("cache of conversations", "right checksum, a speaker number 7",
         conversation_cache(column("speaker", [7])), "is not used", False),
    Case("cache of conversations", "right checksum, JSON nested 100,000 deep",
         conversation_cache(column("about", DEEP)), "is not used", False),
    Case("cache of features", "right checksum, another width",
         feature_cache(lambda t: {**t, "features": torch.zeros(1, 7)}), "is not used", False),
    Case("cache of features", "right checksum, features that are not numbers",
         feature_cache(lambda t: {**t, "features": t["features"] * float("nan")}), "is not used", False),
    Case("cache of features", "right checksum, fewer names than features",
         feature_cache(lambda t: {**t, "keys": t["keys"][:0]}), "is not used", False),
    Case("checkpoint", "a pickle that calls os.system",
         checkpoint_of_run(lambda path, canary: path.write_bytes(pickle.dumps(Payload(canary)))), "is skipped", False),
    Case("checkpoint", "torch.save's archive whose pickle calls os.system",
         checkpoint_of_run(with_payload), "is skipped", False),
    Case("checkpoint", "cut short", checkpoint_of_run(cut), "is skipped", False),
    Case("checkpoint", "one byte is another", checkpoint_of_run(flipped), "is skipped", False),
    Case("checkpoint", "weights of another shape", checkpoint_of_run(with_entries(
        modules={"head.weight": torch.zeros(9, 9), "head.bias": torch.zeros(1)})), "does not fit this run"),
    Case("checkpoint", "random numbers' state is text",
         checkpoint_of_run(with_entries(random=[{"python": "x"}])), "does not fit this run"),
    Case("checkpoint", "of other data", checkpoint_of_run(with_entries(inputs={"data": "x"})), "not the same"),
    Case("CaSiNo's JSON", "nested 100,000 deep", casino(DEEP), "expected the JSON files of CaSiNo"),
    Case("CaSiNo's JSON", "a dialogue's id is a path",
         casino(dialogue(dialogue_id="../../x")), "expected the JSON files of CaSiNo"),
    Case("CaSiNo's JSON", "a dialogue's id is infinite",
         casino(dialogue(dialogue_id=float("inf"))), "expected the JSON files of CaSiNo"),
    Case("CaSiNo's JSON", "participants are a list",
         casino(dialogue(participant_info=["a", "b"])), "expected the JSON files of CaSiNo"),
    Case("CaSiNo's JSON", "an utterance is a list",
         casino(dialogue(chat_logs=[{"id": "a", "text": [1]}])), "expected the JSON files of CaSiNo"),
    Case("conversation", "a transcript that is a pickle", data(pickled_csv), "cliffhanger.csv: ", False),
    Case("conversation", "a transcript that never ends (a link to /dev/zero)", data(never_ending), ": not a file",
         False),
    Case("conversation", "a survey that is a pipe", data(pipe), ": not a file", False),
    Case("conversation", "a folder's name that clears the terminal and forges a line",
         data(speaking_name), "the folder's name has characters that cannot be printed", False),
]  # fmt: skip


class Answer(NamedTuple):
    """What came of a case: exit code, stderr, stdout, and whether the canary was made."""

    code: int
    error: str
    out: str
    ran: bool


def attempt(case: Case, kit, folder: Path) -> Answer:
    """Tries a case as a command would, in an empty folder."""
    canary, path = folder / "canary", list(sys.path)
    out, error, code = io.StringIO(), io.StringIO(), 0
    (folder / "in").mkdir()
    use = case.make(kit, folder / "in", canary)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            errors.run(use)
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.path[:] = path
    return Answer(code, error.getvalue(), out.getvalue(), canary.exists())


# ---------------------------------------------------------------------------------------------------------------------
# Tests


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    return make_kit(tmp_path_factory.mktemp("kit"))


def test_the_sound_files_are_not_refused(kit):
    head = load_reward_head(kit.head)
    assert load_encoder_of_head(head.config, kit.head, 256, None).hidden_size == 32  # a folder relative to the head's
    load_encoder(str(kit.adapter))
    load_policy(str(kit.llama), Adapter(16, 32), torch.float32).load(kit.checkpoint)


def test_pickled_and_split_weights_that_are_sound_are_loaded(kit, tmp_path):
    whole = load_encoder(str(kit.bart)).state_dict()
    shutil.copytree(kit.bart, tmp_path / "pickled")
    weights = load_file(tmp_path / "pickled" / "model.safetensors")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    shutil.copytree(tmp_path / "pickled", tmp_path / "split")
    torch.save(weights, tmp_path / "pickled" / "pytorch_model.bin")
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({n: weights[n] for n in part}, tmp_path / "split" / f"part-{number}.safetensors", {"format": "pt"})
    files = {n: f"part-{i % 2}.safetensors" for i, n in enumerate(names)}
    change(tmp_path / "split" / "model.safetensors.index.json", metadata={}, weight_map=files)
    for kind in ("pickled", "split"):
        found = load_encoder(str(tmp_path / kind)).state_dict()
        assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_head_finds_its_encoder_wherever_both_are_moved_together(kit, tmp_path):
    for name in ("heads", "bart"):
        shutil.copytree(kit.head.parent.parent / name, tmp_path / "moved" / name)
    path = tmp_path / "moved" / "heads" / "reward1_x"
    assert encoder_of_head(load_reward_head(path).config, path) == str(tmp_path / "moved" / "bart")


def test_the_payloads_work_where_nothing_stops_them(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.file}: {case.tried}")
def test_it_gets_one_line_and_nothing_of_it_runs(case, kit, tmp_path):
    found = attempt(case, kit, tmp_path)
    assert not found.ran
    if not case.refused:
        assert found.code == 0 and case.answer in found.out and "\x1b" not in found.out, found
        return
    assert found.code == 2 and case.answer in found.error, found
    assert found.error.count("\n") == 1 and found.error.endswith("\n") and found.error[:-1].isprintable()
    assert str(tmp_path / "in") in found.error


OWN_CODE = """
open({canary!r}, "w")
from transformers import {base} as Base, {base}Config as BaseConfig
class Config(BaseConfig):
    model_type = "own-kind"
class Model(Base):
    config_class = Config
"""


@pytest.fixture
def own(kit, tmp_path, monkeypatch):
    """Makes a folder with code of its own: (kit's folder, library's class, auto class) -> the folder."""
    import transformers

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))

    def make(source: Path, base: str, config: str, auto_class: str) -> Path:
        path = tmp_path / "own"
        shutil.copytree(source, path)
        code = OWN_CODE.format(canary=str(tmp_path / "canary"), base=base).replace(f"{base}Config", config)
        (path / "modeling_own.py").write_text(code)
        names = {"AutoConfig": "modeling_own.Config", auto_class: "modeling_own.Model"}
        change(path / "config.json", model_type="own-kind", auto_map=names)
        return path

    return make


QUICK = ("--train_size", 4, "--epochs", 1, "--context_turns", 2, "--small_model_shrink", "--train")


@pytest.mark.slow
def test_code_of_a_models_own_runs_when_trusted_and_only_then_in_stages_1_and_2(own, kit, tmp_path):
    path = own(kit.bart, "BartModel", "BartConfig", "AutoModel")
    common = ("--data_dir", kit.candor, "--output_dir", tmp_path)
    first = ("train_reward_LI_only.py", *common, "--lang_model_path", path, "--run_name", "li", *QUICK, "--val")
    second = ("train_reward_GELI.py", *common, "--affect_path", "li", "--run_name", "geli", *QUICK)
    refused = call_script(*first, check=2)
    assert "names code of its own" in refused.stderr and refused.stderr.count("\n") == 1
    assert not (tmp_path / "canary").exists()
    call_script(*first, "--trust_remote_code")
    assert (tmp_path / "canary").exists()
    (tmp_path / "canary").unlink()
    refused = call_script(*second, check=2)
    assert "names code of its own" in refused.stderr and not (tmp_path / "canary").exists()
    call_script(*second, "--trust_remote_code")
    saved = next(tmp_path.glob("SINGLE*/lang_model_li"))
    assert (saved / "modeling_own.py").is_file()
    assert type(load_encoder(str(saved), trust_remote_code=True).model).__name__ == "Model"


def test_code_of_a_policys_own_runs_when_trusted_and_only_then(own, kit, tmp_path):
    path = own(kit.llama, "LlamaForCausalLM", "LlamaConfig", "AutoModelForCausalLM")
    options = ("--data_dir", kit.candor, "--output_dir", tmp_path, "--model_name", path, "--context_turns", 2)
    options = ("train_rl_GELI.py", *options, "--generate", "--val_prompts", 2, "--batch_size", 2, "--rf_model", "base")
    refused = call_script(*options, check=2)
    assert "names code of its own" in refused.stderr and not (tmp_path / "canary").exists()
    call_script(*options, "--trust_remote_code")
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("script", ["train_reward_LI_only.py", "train_reward_GELI.py", "train_rl_GELI.py"])
@pytest.mark.parametrize("name", ["../x", "/tmp/x", ".hidden", "a\\b", " x"])
def test_a_runs_name_is_never_a_path(script, name, tmp_path):
    assert "a plain name" in call_script(script, "--run_name", name, check=2).stderr
    assert not list(tmp_path.iterdir())


def test_a_name_that_wandb_gives_is_never_a_path(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setattr(wandb, "init", lambda **_: SimpleNamespace(name="../../x", id="x"))
    name = Tracker("p", tmp_path / "out", {}, RunOptions(), make_accelerator("cpu", "float32")).name
    assert file_name(name) == name


def test_a_models_name_stays_one_part_of_a_path():
    options = train_reward_LI_only.OPTIONS
    options = replace(options, encoder=replace(options.encoder, model="/x/../.."))
    assert "/" not in train_reward_LI_only.project_name(options)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def table(folder: Path) -> str:
    """What was tried and the answer that it got, in Markdown."""
    kit = make_kit(folder / "kit")
    rows = ["| file | what was tried | what came |", "|---|---|---|"]
    for number, case in enumerate(CASES):
        where = folder / str(number)
        where.mkdir()
        found = attempt(case, kit, where)
        lines = (found.error if case.refused else found.out).strip().splitlines()
        said = next((line for line in lines if case.answer in line), "") if case.answer else "loaded; it has no effect"
        said = said.partition("error: ")[2] if case.refused else said
        said = said.replace(f"{where}/in/", "").replace(f"{folder}/", "").replace("|", "\\|")
        came = f"refused: {said}" if case.refused else said
        wrong = found.ran or found.code != (2 if case.refused else 0)
        rows.append(f"| {case.file} | {case.tried} | {'**FAILED** ' if wrong else ''}{came} |")
    return "\n".join(rows)


HEADLINE = """# Hostile inputs

Every file that can come from elsewhere, spoiled in the ways below, and what the program answered. Written by
`python tests/robustness/test_hostile_inputs.py > docs/hostile_inputs.md`, from the cases that the tests run. A refusal
is one line on stderr and exit code 2. A cache, a checkpoint or a conversation that cannot be trusted is not used, and a
line says so. In no case was anything in the file executed.
"""

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stderr(io.StringIO()):
        print(f"{HEADLINE}\n{table(Path(temporary))}")
