"""The README of a saved adapter: a model card."""

from collections.abc import Mapping, Sequence

from geli.nets.pretrained import HUB_ID
from geli.run.errors import one_line
from geli.run.tracking import without_folders

NOT_SHOWN = {"output_dir", "run_name", "resume", "save_steps", "no_cache", "device", "log_text"}
LOAD = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""


def adapter_card(
    name: str,
    measured: Mapping[str, object],
    *,
    base: str,
    about: Mapping[str, object],
    arguments: dict,
    defaults: dict,
) -> str:
    """The card, in Markdown.

    Args:
        name: of the adapter's folder. measured: by name. base: the model under it, a hub id or a folder. about: what it
            was trained on, by name. arguments: of the run; those that differ from `defaults` are told, without folders.
    """
    on_hub = HUB_ID.fullmatch(base) and "/" in base
    header = ["---", "library_name: peft", *[f"base_model: {base}"] * bool(on_hub), "tags: [lora, dialogue]", "---"]
    settings = {
        f"--{option}": without_folders(value)
        for option, value in arguments.items()
        if value != defaults.get(option) and option not in NOT_SHOWN
    }
    return "\n".join([
        *header, "", f"# {name}", "",
        f"A LoRA adapter of `{base}`, aligned with a turn-level reward (GELI, [arXiv 2403.11330]"
        "(https://arxiv.org/abs/2403.11330)). `value_head.safetensors` is the critic, which generation does not need.",
        "", *_table(about), "", "## Measured", "", *_table(measured),
        "", "## How to load", "", LOAD.format(base=base, name=name), "",
        "## Settings that differ from the defaults", "", *_table(settings), "", "## Licence", "",
        "The licences of the base model and of the conversations hold for it too: CANDOR's terms forbid passing "
        "on what is trained on it. The code that trained it is CC BY-NC-SA 4.0.", "",
    ])  # fmt: skip


def _table(rows: Mapping[str, object]) -> Sequence[str]:
    shown = {name: f"{value:.4g}" if isinstance(value, float) else one_line(str(value)) for name, value in rows.items()}
    return ["| | |", "|---|---|", *(f"| {name} | {value.replace('|', '/')} |" for name, value in shown.items())]
