"""A small corpus for runs in tests: two domains of made-up text."""

import json
import random
from pathlib import Path

CODE = "def return if else for while import self x y z ( ) : = + [ ]"
SPEECH = "we the people of this great nation shall never , . and to be"
WORDS = {"code": [*CODE.split(), "\n"], "speech": SPEECH.split()}


def write_corpus(folder: Path, documents: int = 120) -> Path:
    """Writes one .jsonl of both domains and returns its path."""
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "text.jsonl").open("w") as file:
        for number in range(documents):
            domain = ("code", "speech")[number % 2]
            text = " ".join(rng.choices(WORDS[domain], k=rng.randrange(40, 120)))
            row = {"text": f"{number} {text}", "domain": domain}
            file.write(json.dumps(row) + "\n")
    return folder / "text.jsonl"
