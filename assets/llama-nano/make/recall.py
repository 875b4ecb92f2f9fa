"""The recall family: the user, or the system prompt, states facts; a later question asks one."""

from dataclasses import dataclass
from random import Random

from family import Family, Item, Message
from lexicon import FIELDS, PRONOUN

# field: (first person, third person, the field's noun phrase in the first person)
STATED = {
    "name": ("My name is {v}.", "The user's name is {v}.", "my name"),
    "city": ("I live in {v}.", "The user lives in {v}.", "my city"),
    "colour": ("My favourite colour is {v}.", "The user's favourite colour is {v}.",
               "my favourite colour"),
    "job": ("I work as a {v}.", "The user works as a {v}.", "my job"),
    "pet": ("I have a {v}.", "The user has a {v}.", "my pet"),
    "age": ("I am {v} years old.", "The user is {v} years old.", "my age"),
}  # fmt: skip

SEEN = {
    "name": ("What is my name?", "What name do I have?", "Tell me my name."),
    "city": ("Where do I live?", "What is my city?", "In which city do I live?"),
    "colour": ("What is my favourite colour?", "Which colour do I like?",
               "Tell me my favourite colour."),
    "job": ("What is my job?", "Tell me my job.", "Which job do I have?"),
    "pet": ("What is my pet?", "Which pet do I have?", "Tell me my pet."),
    "age": ("What is my age?", "How old am I?", "Tell me my age."),
}  # fmt: skip
UNSEEN = {
    "name": ("Do you know my name?", "Please tell me my name.", "Say my name."),
    "city": ("Which city do I live in?", "Tell me my city.", "What city do I live in?"),
    "colour": ("Which is my favourite colour?", "What colour do I like?",
               "Do you know my favourite colour?"),
    "job": ("Do you know my job?", "What job do I have?", "Please tell me my job."),
    "pet": ("What pet do I have?", "Do you know my pet?", "Please tell me my pet."),
    "age": ("Do you know my age?", "How old am I now?", "Please tell me my age."),
}  # fmt: skip
REPLIES = ("Noted.", "Thank you.", "Good to know.")

FACT_ABOUT = {
    "city": ("{who} lives in {v}.", "The city of {who} is {v}."),
    "colour": ("{who} likes {v} best.", "The favourite colour of {who} is {v}."),
    "job": ("{who} works as a {v}.", "The job of {who} is {v}."),
    "pet": ("{who} has a {v}.", "The pet of {who} is {v}."),
    "age": ("{who} is {v} years old.", "The age of {who} is {v}."),
}


def draw_recall(rng: Random) -> Item:
    """One to three facts about the user, and the field that is asked."""
    fields = rng.sample(list(STATED), rng.randint(1, 3))
    values = {field: rng.choice(FIELDS[field]) for field in fields}
    asked = rng.choice(fields)
    key = " ".join(values.values())
    return {"key": key, "asked": asked, "answer": values[asked], **values}


def stated(item: Item, person: int) -> list[str]:
    """The facts as sentences: in the first person (0) or the third (1)."""
    return [STATED[field][person].format(v=item[field]) for field in STATED if field in item]


@dataclass(frozen=True)
class Recall(Family):
    """Templates depend on the field that is asked; the facts stand in earlier messages."""

    def templates(self, item: Item, seen: bool) -> tuple[str, ...]:
        """The questions about the field that is asked."""
        return (SEEN if seen else UNSEEN)[item["asked"]]

    def history(self, rng: Random, item: Item) -> list[Message]:
        """The messages that state the facts: a system prompt, or turns with short replies."""
        if rng.random() < 0.25:
            return [{"role": "system", "content": " ".join(stated(item, 1))}]
        facts = stated(item, 0)
        rng.shuffle(facts)
        turns = [" ".join(facts)]
        if len(facts) == 2 and rng.random() < 0.5:
            turns = facts
        messages: list[Message] = []
        for turn in turns:
            messages.append({"role": "user", "content": turn})
            messages.append({"role": "assistant", "content": rng.choice(REPLIES)})
        return messages

    def document(self, rng: Random) -> str:
        """Someone says who they are; then it is said again, in the first or the third person."""
        item = self.corpus_item(rng)
        while "name" not in item or (item["asked"] == "name" and len(item) < 5):
            item = self.corpus_item(rng)
        facts = stated(item, 0)
        rng.shuffle(facts)
        style = rng.random()
        if style < 0.4:
            again = " ".join(self._again(item, field) for field in STATED if field in item)
            return f"{' '.join(facts)} {again}"
        about = [
            rng.choice(FACT_ABOUT[field]).format(who=item["name"], v=item[field])
            for field in FACT_ABOUT
            if field in item
        ]
        rng.shuffle(about)
        if style < 0.7:
            return f'"{" ".join(facts)}" {" ".join(about)}'
        pronoun = PRONOUN[item["name"]]
        phrase = STATED[item["asked"]][2].removeprefix("my ")
        owner = "his" if pronoun == "he" else "her"
        return (
            f'"{" ".join(facts)}" They asked about {owner} {phrase}, '
            f"and {pronoun} said: {item['answer']}"
        )

    def _again(self, item: Item, field: str) -> str:
        phrase = STATED[field][2]
        return f"M{phrase[1:]} is {item[field]}."

    def probe(self, rng: Random) -> tuple[str, str]:
        """(facts and the start of a repetition, its end) in plain notation."""
        item = self.sample(rng, True)
        while len(stated(item, 0)) < 2:
            item = self.sample(rng, True)
        facts = " ".join(stated(item, 0))
        return f"{facts} M{STATED[item['asked']][2][1:]} is", item["answer"] + "."


FAMILIES = (Recall("recall", draw_recall, phrases=(), seen=(), unseen=(), weight=2.6),)
