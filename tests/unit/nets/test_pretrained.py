"""Loading models and adapters: sound files are loaded, and what a file may ask for is checked.

`tests/robustness/test_hostile_inputs.py` has the files that are refused.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import small_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from geli.nets.encoder import load_encoder
from geli.nets.options import ENCODERS
from geli.nets.pretrained import check_adapter, load_pretrained, named_by_file, read_json, recorded_base
from geli.nets.sentiment import classifier_sentiment, lexicon_sentiment
from geli.run.errors import UserError


@pytest.fixture(scope="module")
def bart(sample, tmp_path_factory):
    return small_model("bart", tmp_path_factory.mktemp("small") / "bart", sample)


def test_pickled_and_split_weights_are_loaded(bart, tmp_path):
    whole = load_encoder(str(bart)).state_dict()
    shutil.copytree(bart, tmp_path / "pickled")
    weights = load_file(tmp_path / "pickled" / "model.safetensors")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    shutil.copytree(tmp_path / "pickled", tmp_path / "split")
    torch.save(weights, tmp_path / "pickled" / "pytorch_model.bin")
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({n: weights[n] for n in part}, tmp_path / "split" / f"part-{number}.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f"part-{i % 2}.safetensors" for i, n in enumerate(names)}}
    (tmp_path / "split" / "model.safetensors.index.json").write_text(json.dumps(index))
    for kind in ("pickled", "split"):
        loaded = load_encoder(str(tmp_path / kind)).state_dict()
        assert loaded.keys() == whole.keys() and all(torch.equal(loaded[name], whole[name]) for name in whole)


def test_an_encoder_needs_no_weights_of_a_decoder(bart, tmp_path):
    shutil.copytree(bart, tmp_path / "bart")
    weights = load_file(tmp_path / "bart" / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("decoder.")}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "bart" / "model.safetensors", {"format": "pt"})
    load_encoder(str(tmp_path / "bart"))


def test_a_folder_is_never_looked_up_on_the_hub(bart, monkeypatch):
    seen = {}

    class Auto:
        @staticmethod
        def from_pretrained(name, **arguments):
            seen[name] = arguments
            return "loaded"

    assert load_pretrained(Auto, str(bart), "--model") == "loaded"
    assert seen[str(bart)] == {"local_files_only": True, "trust_remote_code": False}
    load_pretrained(Auto, "org/name", "--model", trust_remote_code=True)
    assert seen["org/name"] == {"local_files_only": False, "trust_remote_code": True}


def test_json_is_read_or_refused_in_words(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert read_json(path, "it") == {"a": 1}
    for content, message in {"[1]": "it: expected a JSON object, found list", "x": "it: expected JSON"}.items():
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_json(path, "it")


def test_a_file_names_folders_known_encoders_and_models_of_this_machine_only(tmp_path):
    assert named_by_file(str(tmp_path), "head") == str(tmp_path)
    assert named_by_file(ENCODERS["convo"].hub_id, "head") == ENCODERS["convo"].hub_id
    with pytest.raises(UserError, match=r"head: names the model org/name, which is not on this machine"):
        named_by_file("org/name", "head")
    for name in ("../../x", "/x", "a/b/c", "https://x", "a..b", "a\0b"):
        with pytest.raises(UserError, match="expected a hub id or an existing folder"):
            named_by_file(name, "head")


def test_an_adapter_records_its_base_and_plain_lora_is_accepted(sample, tmp_path):
    base = small_model("llama-encoder", tmp_path / "llama", sample)
    load_encoder(str(base), adapt=True).save(tmp_path / "adapter")
    assert recorded_base(tmp_path / "adapter", "--model") == str(base.resolve())
    assert check_adapter(tmp_path / "adapter", "--model")["r"] == 8
    config = read_json(tmp_path / "adapter" / "adapter_config.json", "it")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="names no base_model_name_or_path"):
        recorded_base(tmp_path / "adapter", "--model")


def test_some_weights_missing_is_an_error(bart, tmp_path):
    config = AutoConfig.from_pretrained(bart)
    config.encoder_layers = 3
    with pytest.raises(UserError, match=r"its weights lack 16 that its config\.json asks for"):
        load_pretrained(AutoModel, str(bart), "--model", config=config)


# ---------------------------------------------------------------------------------------------------------------------
# Sentiment


def test_the_lexicon_knows_good_from_bad():
    good, bad, unknown = lexicon_sentiment(["That is wonderful!", "That is terrible.", "xyzzy"])
    assert good > 0.5 and bad < -0.5 and unknown == 0


@pytest.fixture(scope="module")
def classifier(bart, tmp_path_factory):
    """Makes a classifier with these labels: labels -> its folder."""

    def make(*labels):
        folder = tmp_path_factory.mktemp("classifier")
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(bart, id2label=dict(enumerate(labels)))
        with torch.no_grad():
            model.classification_head.out_proj.weight.mul_(200)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(bart).save_pretrained(folder)
        return folder

    return make


TEXTS = ["what a day", "", "no " * 400, "I read that it has changed", *(f"number {n}" for n in range(90))]


def test_a_classifier_gives_positive_minus_negative_probability(classifier):
    folder = classifier("NEUTRAL", "Negative", "positive")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        inputs = [tokenizer(text, truncation=True, max_length=256, return_tensors="pt") for text in TEXTS]
        p = torch.cat([model(**one).logits.softmax(dim=1) for one in inputs])
    expected = (p[:, 2] - p[:, 1]).numpy()
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(classifier_sentiment(str(folder), TEXTS), expected, atol=1e-5)
    assert classifier_sentiment(str(folder), []).shape == (0,)


def test_a_classifier_of_something_else_is_refused(classifier):
    for labels in (("joy", "anger"), ("positive", "other")):
        with pytest.raises(UserError, match=f"labels that begin with pos and neg, found {labels[0]}, {labels[1]}"):
            classifier_sentiment(str(classifier(*labels)), ["x"])
