"""The prompts of stage 3, and the forms in which a language model reads them."""

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple

from geli.data.messages import INSTRUCTION, ends_in_thought, is_empty_thought
from geli.run.errors import UserError, first_line


class Prompt(NamedTuple):
    """A state of a real conversation.

    Attributes:
        text: the state as the published code writes it. context: input of the reward's encoder.
        human: the human's response.
        trajectory: (context, response) of all agent turns of its trajectory (one tuple that its prompts share).
        position: index of this turn in `trajectory`; rewards that depend on earlier turns see those before it.
        name: conversation/flip/turn_id.
        turns: (is_agent, utterance) of each turn in the state.
    """

    text: str
    context: str
    human: str
    trajectory: tuple[tuple[str, str], ...] = ()
    position: int = 0
    name: str = ""
    turns: tuple[tuple[bool, str], ...] = ()


def context_text(turns: Iterable[tuple[bool, str]]) -> str:
    """A state as text: its turns (is_agent, utterance), each ` User: ...` or ` AI: ...`, joined by spaces."""
    return " ".join(f" {'AI' if is_agent else 'User'}: {utterance}" for is_agent, utterance in turns)


def prompt_text(context: str) -> str:
    """A state as the published code writes it: the instruction, the last turns, and ` AI:`."""
    return f"{INSTRUCTION}{context} AI:"


def with_instruction(prompt: Prompt, instruction: str) -> Prompt:
    """The prompt with `instruction` in its text in place of the published one."""
    told = prompt.text.startswith(INSTRUCTION)
    return prompt._replace(text=instruction + prompt.text.removeprefix(INSTRUCTION)) if told else prompt


class RawFormat:
    """The published form: the instruction, ` User: …` and ` AI: …` for the turns, and ` AI:`, as plain text.

    Args:
        tokenizer: of the language model. continues: whether responses continue prompts, as a causal model's do.

    Attributes:
        end: id of the token that is written behind a response; None if the tokenizer has none.
        instruction: what the model is told before a conversation; the texts of prompts begin with the same.
    """

    instruction = INSTRUCTION

    def __init__(self, tokenizer, continues: bool = True):
        self.tokenizer, self.continues = tokenizer, continues

    @property
    def end(self) -> int | None:
        """Id of the tokenizer's end token."""
        return self.tokenizer.eos_token_id

    def _tokens(self, text: str) -> list[int]:
        """Ids of a text, without the end token that some tokenizers add, where a response is to follow."""
        tokens = self.tokenizer(text, verbose=False)["input_ids"]
        return tokens[:-1] if self.continues and tokens[-1:] == [self.end] and len(tokens) > 1 else tokens

    def encode(self, prompt: Prompt, limit: int) -> list[int]:
        """Token ids of a prompt, at most `limit`. One that is too long keeps the instruction and its end."""
        tokens = self._tokens(prompt.text)
        if len(tokens) > limit:
            instruction = self._tokens(self.instruction)
            common = takewhile(lambda both: both[0] == both[1], zip(instruction, tokens, strict=False))
            kept = min(sum(1 for _ in common), limit - 1)
            tokens = [*tokens[:kept], *tokens[kept - limit :]]
        return tokens

    def answer(self, prompt: Prompt, text: str) -> list[int]:
        """Token ids of ` {text}` after the prompt, and the end token."""
        alone, both = self._tokens(prompt.text), self._tokens(f"{prompt.text} {text}")
        if both[: len(alone)] == alone:
            answer = both[len(alone) :]
        else:  # the tokenizer merges the end of the prompt with the beginning of the answer
            answer = self.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
        return answer if answer[-1:] == [self.end] else [*answer, self.end]


class ChatFormat:
    """The form that a chat model was trained on, by its tokenizer's chat template.

    The instruction is the system message, the user's turns are user messages, and the agent's are assistant messages.
    Consecutive turns of one speaker are joined. A template without system messages gets the instruction at the
    beginning of the first user message, and one that must begin with a user message loses an agent's turn before it.
    A template that has a mode without thinking is used in it; one that writes an empty thought before every answer
    gets it in prompts, too.

    Args:
        tokenizer: of the language model. continues: not used.

    Raises:
        UserError: if it has no chat template, or one that fails or begins every response with a thought.
    """

    instruction = INSTRUCTION

    def __init__(self, tokenizer, continues: bool = True):
        if not tokenizer.chat_template:
            raise UserError(
                f"--prompt_format chat: the tokenizer of {tokenizer.name_or_path} has no chat template; use raw"
            )
        self.tokenizer, self.no_thought = tokenizer, ""
        try:
            self.end, self.no_thought = self._find_end()
        except Exception as error:  # templates are other people's programs
            name, reason = tokenizer.name_or_path, first_line(error)
            raise UserError(f"--prompt_format chat: the chat template of {name} fails: {reason}; use raw") from None
        if ends_in_thought(self._prompt([{"role": "user", "content": "question"}])):
            raise UserError(
                f"--prompt_format chat: the chat template of {tokenizer.name_or_path} begins every response with a "
                "thought (<think>), which is no speech: use a model with a mode without thinking, or raw"
            )

    def _find_end(self) -> tuple[int | None, str]:
        """Id of the token that the template puts behind an assistant message (the tokenizer's end token if it puts
        none), and the empty thought that it puts before the last one and not in prompts."""
        question, mark = [{"role": "user", "content": "question"}], "answer"
        before, _, text = self._render([*question, {"role": "assistant", "content": mark}]).rpartition(mark)
        after = self._tokens(text.lstrip())[:1]
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        thought = before.removeprefix(self._prompt(question))
        return (
            after[0] if after and after[0] in special else self.tokenizer.eos_token_id,
            thought if thought != before and is_empty_thought(thought) else "",
        )

    def messages(self, turns: Sequence[tuple[bool, str]]) -> list[dict[str, str]]:
        """The chat messages of a state, in the first of three arrangements that the template takes.

        Args:
            turns: (is_agent, utterance) of each turn.
        """
        joined: list[dict[str, str]] = []
        for is_agent, utterance in turns:
            role = "assistant" if is_agent else "user"
            if joined and joined[-1]["role"] == role:
                joined[-1]["content"] += f" {utterance}"
            else:
                joined.append({"role": role, "content": utterance})
        from_user = joined[1:] if joined and joined[0]["role"] == "assistant" else joined
        system = {"role": "system", "content": self.instruction}
        first = "\n\n".join([self.instruction, *(message["content"] for message in from_user[:1])])
        arrangements = ([system, *joined], [system, *from_user], [{"role": "user", "content": first}, *from_user[1:]])
        for messages in arrangements[:-1]:
            try:
                if self.instruction in self._prompt(messages):
                    return messages
            except Exception:  # templates refuse messages by raising errors of any kind
                continue
        return arrangements[-1]

    def encode(self, prompt: Prompt, limit: int) -> list[int]:
        """Token ids. A prompt that is too long loses whole turns from the left."""
        return self._tokens(self._prompt(self._fit(prompt, limit)))

    def answer(self, prompt: Prompt, text: str) -> list[int]:
        """Token ids of an assistant message after the prompt, up to its end token."""
        messages = self.messages(prompt.turns)
        if messages[-1]["role"] == "assistant":
            content = f"{messages[-1]['content']} {text}"
            whole = self._render([*messages[:-1], {"role": "assistant", "content": content}])
        else:
            whole = self._render([*messages, {"role": "assistant", "content": text}])
        start = self._prompt(messages)
        answer = self._tokens(whole.removeprefix(start) if whole.startswith(start) else text)
        return [*(answer[: answer.index(self.end)] if self.end in answer else answer), self.end]

    def _fit(self, prompt: Prompt, limit: int) -> list[dict[str, str]]:
        """Messages of the last turns of the prompt that fit into `limit` tokens."""
        for first in range(len(prompt.turns) + 1):
            messages = self.messages(prompt.turns[first:])
            if len(self._tokens(self._prompt(messages))) <= limit:
                break
        return messages

    def _prompt(self, messages: list[dict[str, str]]) -> str:
        """The text up to where the response begins. A last message of the agent is continued by it."""
        if messages[-1]["role"] == "assistant":
            return self._render(messages, continue_final_message=True)
        return self._render(messages, add_generation_prompt=True) + self.no_thought

    def _render(self, messages: list[dict[str, str]], **how) -> str:
        how |= {"enable_thinking": False, "thinking": False}  # the names that templates have for it
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **how)

    def _tokens(self, text: str) -> list[int]:
        """Ids of a rendered text, which has its special tokens already."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


PromptFormat = RawFormat | ChatFormat
PROMPT_FORMATS = {"raw": RawFormat, "chat": ChatFormat}  # a choice of `--prompt_format`: tokenizer -> its form
