"""The chats that experiments/credit.py reads, with one score and some labels of single turns; and their embeddings."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from geli.nets.encoder import TokenPair, TurnEncoder
from geli.nets.features import FeatureCache, encoder_fingerprint
from geli.nets.prompts import context_text

LONGEST, ROOM = 192, 509  # tokens of a turn, and of a turn with its context, without special tokens
BUTTONS = {"Submit-Deal", "Accept-Deal", "Reject-Deal", "Walk-Away"}  # of CaSiNo: no utterances
SHARED = {"showing-empathy", "promote-coordination", "small-talk"}  # CaSiNo's strategies that are labelled 1
OWN = {"self-need", "uv-part"}  # and 0: one's own need, undervaluing the partner


@dataclass(frozen=True)
class Chat:
    """One person's rating of a conversation with an agent.

    Attributes:
        conversation: id, which two chats share if both sides rate. turns: (is_agent, text).
        score: R in points, 0 to 100. ratings: of all its raters.
        labels: index of an agent's turn -> people's label of it.
    """

    conversation: str
    turns: list[tuple[bool, str]]
    score: float
    ratings: list[float] = field(default_factory=list)
    labels: dict[int, float] = field(default_factory=dict)

    @property
    def agent_turns(self) -> list[int]:
        """Indices of the agent's turns."""
        return [i for i, (is_agent, _) in enumerate(self.turns) if is_agent]

    def answer(self, turn: int) -> str:
        """What the user says next after a turn; empty if nothing."""
        return next((text for is_agent, text in self.turns[turn + 1 :] if not is_agent), "")


def read_dstc9(source: Path) -> list[Chat]:
    """The conversations of chats.jsonl, rated from 1 to 5, some with a `turn_rating` of 0, 1 or 2 under each turn."""
    chats = []
    for line in source.read_text(encoding="utf-8").splitlines():
        chat = json.loads(line)
        messages, ratings = chat["messages"], chat["ratings"]
        labels = {i: m["turn_rating"] for i, m in enumerate(messages) if m.get("turn_rating") is not None}
        turns = [(m["role"] == "assistant", m["content"]) for m in messages]
        chats.append(Chat(chat["id"], turns, 25 * (float(np.mean(ratings)) - 1), ratings, labels))
    return chats


def read_casino(folder: Path) -> list[Chat]:
    """Two chats of each dialogue: a person's utterances, and how much the other one likes that person. Turns of which
    all strategies are `SHARED`, or none of them is and some are `OWN`, have the label 1 or 0."""
    levels = ("Extremely dislike", "Slightly dislike", "Undecided", "Slightly like", "Extremely like")
    chats = []
    for path in sorted(folder.glob("casino_*.json")):
        for dialogue in json.loads(path.read_text(encoding="utf-8")):
            said = [m for m in dialogue["chat_logs"] if m["text"] not in BUTTONS]
            strategies, marked = {}, dialogue["annotations"]
            if [text for text, _ in marked] == [m["text"] for m in said]:
                strategies = {i: set(names.split(",")) for i, (_, names) in enumerate(marked)}
            for agent, user in (sorted(dialogue["participant_info"])[::step] for step in (1, -1)):
                liked = dialogue["participant_info"][user]["outcomes"]["opponent_likeness"]
                labels = {
                    i: float(bool(names & SHARED)) for i, names in strategies.items()
                    if said[i]["id"] == agent and bool(names & SHARED) != bool(names & OWN)
                }  # fmt: skip
                turns = [(m["id"] == agent, m["text"]) for m in said]
                if liked in levels and any(is_agent for is_agent, _ in turns):
                    name = f"casino-{dialogue['dialogue_id']}"
                    chats.append(Chat(name, turns, 25.0 * levels.index(liked), labels=labels))
    return chats


class MeanEncoder(TurnEncoder):
    """A turn's representation is the mean of its last hidden states, as sentence encoders are trained."""

    def forward(self, input_ids, attention_mask, **segments):
        """(n, hidden) means over the tokens of right-padded rows (n, longest)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **segments).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


def embed(encoder: TurnEncoder, texts: Sequence[tuple[str, str]], cache: Path) -> np.ndarray:
    """(n, hidden) float32 embeddings of unit length of (context, text); a text without context is encoded alone.
    `cache`: folder that keeps them, also those of a call that was stopped."""
    tokenizer = encoder.tokenizer
    start, end = ([t] if t is not None else [] for t in (tokenizer.cls_token_id, tokenizer.sep_token_id))

    def ids(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    pairs = []
    for context, text in texts:
        own = ids(text)[-LONGEST:]
        before = [*start, *ids(context)[len(own) - ROOM :], *end] if context else start
        whole = np.array([*before, *own, *end], dtype=np.int32)
        pairs.append(TokenPair(whole, len(before) if context else len(whole)))
    kept = FeatureCache(cache, encoder_fingerprint(encoder, "mean"), encoder.hidden_size)
    found = kept.encode(pairs, partial(encoder.encode, progress="encoding")).numpy()
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def inputs(chat: Chat, context_turns: int) -> list[tuple[str, str]]:
    """(context, response) of each agent turn; without context the bare response."""
    if not context_turns:
        return [("", chat.turns[i][1]) for i in chat.agent_turns]
    return [
        (context_text(tuple(chat.turns[max(0, i - context_turns) : i])), f"AI: {chat.turns[i][1]}")
        for i in chat.agent_turns
    ]
