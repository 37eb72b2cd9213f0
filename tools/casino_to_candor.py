"""Writes the CaSiNo corpus (Chawla et al., NAACL 2021, CC BY 4.0) in CANDOR's layout.

    python tools/casino_to_candor.py FOLDER_WITH_CASINO_JSON OUT

What stands for what: both people's opponent_likeness is overall_affect and i_like_you, their satisfaction is
how_enjoyable and end_affect; the emoticon in a person's utterance is that person's face during the turn before it;
2.5 words take a second, and half a second lies between turns.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, whose modules are imported below

from geli.data.writer import write_conversation
from geli.run.console import progress_bar
from geli.run.errors import UserError, run
from geli.run.files import require_empty_folder
from geli.run.options import new_parser

BUTTONS = {"Submit-Deal", "Accept-Deal", "Reject-Deal", "Walk-Away"}  # presses, not utterances
EMOTICONS = {"🙂": "happiness", "☹": "sadness", "😡": "anger", "😮": "surprise"}
_EMOTICON = re.compile("([" + "".join(EMOTICONS) + "])\ufe0f?")  # some carry a variation selector

LEVELS = {
    "Extremely dissatisfied": 1, "Slightly dissatisfied": 3, "Undecided": 5,
    "Slightly satisfied": 7, "Extremely satisfied": 9,
    "Extremely dislike": 1, "Slightly dislike": 3, "Slightly like": 7, "Extremely like": 9,
}  # fmt: skip
ANSWERS = {
    "overall_affect": "opponent_likeness",
    "i_like_you": "opponent_likeness",
    "how_enjoyable": "satisfaction",
    "end_affect": "satisfaction",
}
WORDS_PER_SECOND, PAUSE = 2.5, 0.5


def convert_dialogue(dialogue: dict, out: Path) -> int:
    """Writes one dialogue as the folder `out/casino-<id>`; returns how many turns it has."""
    conversation_id = f"casino-{int(dialogue['dialogue_id']):04d}"
    user_of = {name: f"{conversation_id}-{name}" for name in sorted(dialogue["participant_info"])}
    utterances = [message for message in dialogue["chat_logs"] if message["text"] not in BUTTONS]
    turns, faces, clock = [], [], 0.0
    for i, message in enumerate(utterances):
        text = " ".join(_EMOTICON.sub(" ", message["text"]).split())
        words = len(text.split())
        start, stop = clock, clock + words / WORDS_PER_SECOND
        clock = stop + PAUSE
        turns.append((user_of[message["id"]], start, stop, text))
        following = utterances[i + 1] if i + 1 < len(utterances) else None
        if following is not None and following["id"] != message["id"]:
            shown = _EMOTICON.search(following["text"])
            if shown:
                faces.append((user_of[following["id"]], start, stop, EMOTICONS[shown.group(1)]))
    answers = {
        user_of[name]: {
            question: LEVELS[person["outcomes"][field]]
            for question, field in ANSWERS.items()
            if person["outcomes"].get(field) in LEVELS
        }
        for name, person in dialogue["participant_info"].items()
    }
    write_conversation(out / conversation_id, turns, faces, answers)
    return len(turns)


def main() -> None:
    """Command line."""
    parser = new_parser("Write the CaSiNo corpus in CANDOR's layout.")
    parser.add_argument("source", help="folder with casino_train.json, casino_valid.json and casino_test.json")
    parser.add_argument("out", help="folder to write one folder a conversation to (becomes --data_dir)")
    args = parser.parse_args()

    source, out = Path(args.source), Path(args.out)
    files = [source / f"casino_{part}.json" for part in ("train", "valid", "test")]
    if missing := [path.name for path in files if not path.is_file()]:
        raise UserError(f"{source}: expected casino_train.json, casino_valid.json, casino_test.json; no {missing[0]}")
    require_empty_folder(out)

    conversations = turns = 0
    for path in files:
        try:
            dialogues = json.loads(path.read_text(encoding="utf-8"))
            for dialogue in progress_bar(dialogues, desc=path.name, unit="dialogue"):
                turns += convert_dialogue(dialogue, out)
                conversations += 1
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: expected a JSON list of CaSiNo's dialogues ({error!r})") from None
    print(f"Wrote {conversations:,} conversations with {turns:,} turns to {out}")


if __name__ == "__main__":
    run(main)
