"""Byte-level BPE in Hugging Face's files: DeepSeek-V3's own tokenizer, or ours.

A folder holds tokenizer.json and, if need be, tokenizer_config.json (which strings are
bos, eos and pad; the chat template) or chat_template.jinja, as the released ones do; so
other libraries read what `save` writes. Beside them `save` leaves about.json with the
hash.

The added tokens of such a file (bos, <｜User｜>, <think>, ...) are called markers here.
Hugging Face matches them in any text; `encode` does so only when told to, since in a
document they are just words. Other kinds of tokenizer are refused: they lose text.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.files import write_bytes, write_text
from deepseek_jax.tokenizer import bytelevel, chat
from deepseek_jax.tokenizer.base import ABOUT, hash_of, write_about

KIND = "huggingface"
CONFIG, TEMPLATE, SEAL = "tokenizer_config.json", "chat_template.jinja", "about.json"

# DeepSeek's names, for files that don't say which marker is which.
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
SPECIAL = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}


class HuggingFace:
    """A tokenizer, given as the bytes of tokenizer.json and a tokenizer_config.

    Attributes:
      markers: the id of every added token.
      config: tokenizer_config.json, with the chat template if there is one.

    Raises:
      ValueError: the package tokenizers is missing, or the file is no lossless
        byte-level BPE, or names no bos or eos.
    """

    def __init__(self, content: bytes, config: Mapping[str, Any] | None = None):
        parsed = bytelevel.parse(content)
        self._content = content
        self.config = dict(config or {})
        self.markers: dict[str, int] = {
            token["content"]: token["id"] for token in parsed["added_tokens"]
        }
        if short := [name for name in self.markers if len(name) < 2]:
            raise ValueError(f"its marker {short[0]!r} is too short to be kept apart")
        self._guard = chat.Guard(self.markers)
        self._plain = bytelevel.engine(parsed)
        numbers = set(self.markers.values())
        self._bytes = {
            number: bytelevel.spelt(token)
            for token, number in parsed["model"]["vocab"].items()
            if number not in numbers
        }
        self._bytes_and_markers = self._bytes | {
            number: name.encode() for name, number in self.markers.items()
        }
        self.vocab_size = max(self._bytes_and_markers) + 1
        if missing := bytelevel.EVERY_BYTE - set(self._bytes.values()):
            raise ValueError(f"its vocabulary lacks {len(missing)} of the 256 bytes")
        if spelt := [m for m in self.markers if numbers & {*self.encode(m)}]:
            raise ValueError(f"text can spell its marker {spelt[0]!r}")
        self.bos_id, self.eos_id = (
            self._special(n) for n in ("bos_token", "eos_token")
        )
        # Released configurations pad with eos, but their vocabulary has a pad.
        self.pad_id = self.markers.get(PAD, self._special("pad_token", self.eos_id))
        own = [self.bos_id, self.eos_id, self.pad_id, self.markers]
        canonical = json.dumps([parsed, own], sort_keys=True)
        self.hash = hash_of(KIND, canonical.encode())

    @property
    def fim_ids(self) -> tuple[int, int, int]:
        """Begin, hole, end.

        Raises:
          ValueError: this tokenizer has none.
        """
        if missing := [name for name in FIM if name not in self.markers]:
            raise ValueError(f"this tokenizer has no {missing[0]} to fill in with")
        begin, hole, end = (self.markers[name] for name in FIM)
        return begin, hole, end

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of conversations, None if the files hold none."""
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {item["name"]: item["template"] for item in template}
            template = named.get("default")
        return template

    def encode(self, text: str, *, markers: bool = False) -> list[int]:
        """Ids of a text.

        Args:
          markers: strings that spell a marker become it, as in Hugging Face's library:
            only for text that may do so. bos and eos are never put in.
        """
        if not markers:
            ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
            return ids
        return self._join(self._guard.split(text))

    def decode(self, ids: Sequence[int], *, markers: bool = False) -> str:
        """The text of ids; ids that the tokenizer doesn't know become nothing.

        Args:
          markers: spell markers out instead of dropping them.
        """
        table = self._bytes_and_markers if markers else self._bytes
        return b"".join(table.get(i, b"") for i in ids).decode(errors="replace")

    def chat_text(
        self,
        messages: Sequence[chat.Message],
        *,
        add_generation_prompt: bool = False,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """A conversation as text, its markers spelt out.

        Args:
          messages: dicts of role, content, and what else the template knows.
          add_generation_prompt: end with the opening of an answer.
          template: instead of the tokenizer's own; `chat.TURNS` is DeepSeek's format.
          variables: more for the template, such as tools=[...].

        Raises:
          ValueError: no template, no messages, or a template that refuses them.
        """
        chat.check(messages)
        template = template or self.chat_template
        if not template:
            raise ValueError(
                f"this tokenizer has no chat template: its folder needs {TEMPLATE}, or "
                f"chat_template in {CONFIG}; or pass template=, for DeepSeek's markers "
                "deepseek_jax.tokenizer.chat.TURNS"
            )
        special = {name: self._name(name) for name in SPECIAL}
        return chat.render(
            template,
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            **special | variables,
        )

    def chat(
        self,
        messages: Sequence[chat.Message],
        *,
        add_generation_prompt: bool = False,
        template: str | None = None,
        trusted: Sequence[str] = ("assistant",),
        **variables: Any,
    ) -> list[int]:
        """A conversation as ids, bos included if the template writes it.

        Args: as `chat_text`, and
          trusted: roles whose text may contain markers (an answer has its <think>);
            in all other text, and in `variables`, they are just words.

        Raises:
          ValueError: as `chat_text`.
        """
        chat.check(messages)
        said = [list(messages), variables, template or self.chat_template]
        spelt = json.dumps(said, ensure_ascii=False, default=str)
        guard = chat.free_character(spelt + "".join(self.markers))
        quoted = [
            m
            if m["role"] in trusted
            else {"role": m["role"]}
            | self._guard.quoted({k: v for k, v in m.items() if k != "role"}, guard)
            for m in messages
        ]
        text = self.chat_text(
            quoted,
            add_generation_prompt=add_generation_prompt,
            template=template,
            **self._guard.quoted(variables, guard),
        )
        return self._join([p.replace(guard, "") for p in self._guard.split(text)])

    def save(self, folder: str | Path) -> None:
        """Writes the folder that `tokenizer.load` and Hugging Face's libraries read."""
        folder = Path(folder)
        config = json.dumps(self.config, indent=1, ensure_ascii=False)
        write_text(folder / CONFIG, f"{config}\n")
        write_about(folder, KIND, self, SEAL)
        write_bytes(folder / ABOUT, self._content)

    def _join(self, parts: list[str]) -> list[int]:
        """Ids of text, marker, text, ... marker, text."""
        ids = self.encode(parts[0])
        for marker, text in zip(parts[1::2], parts[2::2]):
            ids += [self.markers[marker], *self.encode(text)]
        return ids

    def _name(self, role: str) -> str:
        """What bos_token, eos_token or pad_token spells, "" if there is none."""
        named = self.config.get(role)
        named = named.get("content") if isinstance(named, Mapping) else named
        return str(named or (SPECIAL[role] if SPECIAL[role] in self.markers else ""))

    def _special(self, role: str, default: int | None = None) -> int:
        number = self.markers.get(self._name(role), default)
        if number is None:
            raise ValueError(
                f"no added token is its {role} {self._name(role)!r}: {CONFIG} must "
                "name one"
            )
        return number


def recognises(path: Path) -> bool:
    """Whether a file is a tokenizer.json in Hugging Face's format."""
    return path.is_file() and b'"added_tokens"' in path.read_bytes()


def read(path: Path) -> HuggingFace:
    """The tokenizer of a folder, or of a tokenizer.json and what stands beside it.

    Raises:
      ValueError: a missing or damaged file, or what `HuggingFace` refuses.
    """
    file = path / ABOUT if path.is_dir() else path
    folder = file.parent
    config = _read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if (folder / TEMPLATE).is_file():
        text = (folder / TEMPLATE).read_text("utf-8")
        config = config | {"chat_template": text}
    try:
        tokenizer = HuggingFace(file.read_bytes(), config)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None
    sealed = (folder / SEAL).is_file()
    if sealed and _read_json(folder / SEAL).get("hash") != tokenizer.hash:
        raise ValueError(
            f"{folder} is damaged: its files don't have the hash that {SEAL} names; "
            "copy it again, or remove that file if you meant to change them"
        )
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged; copy it again")
    return value
