"""Ordinary prompts for the demo, and how they come to an exact number of tokens."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTIONS = (
    "How do I keep basil alive on a kitchen window sill?",
    "Explain in a few sentences why the sky is blue.",
    "Write a short thank-you note to a neighbour who watered my plants.",
    "What is the difference between a list and a tuple in Python?",
    "Give me three ideas for a rainy Sunday with two children.",
    "Why does bread rise, and what goes wrong when it does not?",
    "Suggest a name for a small bookshop, and say why it fits.",
    "How does a bicycle stay upright while it moves?",
)

OPENINGS = (
    "On the first day of spring, the ferry crossed the lake with only three passengers on board:",
    "The first rule of growing tomatoes is to",
    "The old clock in the museum stopped at noon, and nobody knew why. The keeper of the clocks",
    "There are three kinds of bread in this bakery. The first is",
    "Once upon a time there was a small owl who was afraid of the dark. Every evening,",
    "The train to the coast left at seven. Anna had packed her sketchbook and",
    "Bees are important because",
    "The sea was calm, and the children built a castle out of sand. Then",
)

# What stands before the question or the opening, as far as the trace asks for longer prompts.
NOTES = (
    "The town lies where the river meets the lake. In spring the ferries run from early morning until dusk.",
    "A garden needs three things: light, water and somebody who looks at it every day.",
    "The museum has moved to the old brewery; its collection of clocks fills the whole first floor.",
    "Last year the bakery sold more rye bread than wheat bread for the first time.",
    "Trains to the coast leave every hour, and the journey takes a little under fifty minutes.",
    "The school orchestra practises on Tuesdays. This term they are learning a waltz.",
    "Wood that has dried for two years burns better than wood that has dried for one.",
    "The path up the hill is steep but short, and the view from the top reaches to the sea.",
    "In the evening the square fills with people who have nothing to do but talk.",
    "The observatory opens its doors once a month, if the sky is clear.",
)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, index: int, length: int) -> list[int]:
    """A question in the tokenizer's chat template, behind as many notes as make it length tokens."""
    mark = "\0"
    if tokenizer.chat_template:
        message = [{"role": "user", "content": mark}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    else:
        text = f"Question: {mark}\nAnswer:"
    before, _, after = str(text).partition(mark)
    question = QUESTIONS[index % len(QUESTIONS)]
    return _fill(tokenizer, before, "\n\n" + question + after, index, length)


def completion_prompt(tokenizer: PreTrainedTokenizerBase, index: int, length: int) -> list[int]:
    """The opening of a text, behind as many notes as make it length tokens."""
    return _fill(tokenizer, "", "\n\n" + OPENINGS[index % len(OPENINGS)], index, length)


def _fill(tokenizer: PreTrainedTokenizerBase, before: str, after: str, index: int, length: int) -> list[int]:
    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    head, tail = tokens(before), tokens(after)
    wanted = length - len(head) - len(tail)
    notes: list[int] = []
    turned = NOTES[index % len(NOTES) :] + NOTES[: index % len(NOTES)]
    for note in cycle(turned):
        if len(notes) >= wanted:
            break
        notes += tokens(note + " ")
    return (head + notes[: max(wanted, 0)] + tail)[-length:]
