"""What a tokenizer.json must be for `tokenizer.huggingface`: byte-level BPE, lossless.

Byte-level BPE writes each byte as one character of an alphabet of 256 and merges those,
so any text can be encoded and comes back whole, unless a normalizer or pre-tokenizer
changes it first. Files in which one does are refused.
"""

import json
from collections.abc import Mapping
from typing import Any

from deepseek_jax.tokenizer.base import need_package


def parse(content: bytes) -> dict[str, Any]:
    """A checked tokenizer.json.

    Raises:
      ValueError: it is damaged, or a tokenizer that would not give all text back.
    """
    try:
        parsed = json.loads(content)
        model, before = parsed["model"], _steps(parsed.get("pre_tokenizer"))
        normalizers = _steps(parsed.get("normalizer"))
        [(token["content"], token["id"]) for token in parsed["added_tokens"]]
        kind = model.get("type", "BPE")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"is damaged or no tokenizer.json ({type(error).__name__}: {error}); of a "
            "tokenizer that was saved here, name the folder"
        ) from None
    wrong = [step["type"] for step in before if not _keeps_text(step)]
    wrong += [step["type"] for step in normalizers]
    if kind != "BPE" or not any(step["type"] == "ByteLevel" for step in before):
        wrong = [f"model {kind} without ByteLevel", *wrong]
    changing = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    wrong += [name for name in changing if model.get(name)]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}: only byte-level BPE that gives every text back is "
            "supported, as DeepSeek's is"
        )
    return dict(parsed)


def _steps(part: Mapping[str, Any] | None) -> list[Any]:
    """The steps of a normalizer or pre-tokenizer, sequences unrolled."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        inner = part.get("pretokenizers") or part.get("normalizers") or []
        return [step for item in inner for step in _steps(item)]
    return [part]


def _keeps_text(step: Mapping[str, Any]) -> bool:
    """Whether a pre-tokenizer only cuts, and neither adds nor drops anything."""
    if step["type"] == "ByteLevel":
        return not bool(step.get("add_prefix_space", True))
    if step["type"] in ("Split", "Punctuation"):
        return bool(step.get("behavior", "Isolated") != "Removed")
    return step["type"] == "Digits"


def engine(parsed: Mapping[str, Any]) -> Any:
    """The tokenizer without its markers and all that is done to finished ids."""
    need_package("tokenizers", "a tokenizer in Hugging Face's format")
    import tokenizers

    bare = dict.fromkeys(("post_processor", "truncation", "padding"))
    content = json.dumps({**parsed, **bare, "added_tokens": []})
    try:
        return tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the package raises plain Exception
        raise ValueError(f"the package tokenizers can't read it: {error}") from None


def _alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: itself if it prints."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in seen]
    shown = {chr(byte): byte for byte in seen}
    return shown | {chr(256 + i): byte for i, byte in enumerate(rest)}


_ALPHABET = _alphabet()
EVERY_BYTE = {bytes([byte]) for byte in range(256)}


def spelt(token: str) -> bytes:
    """The bytes that a token stands for."""
    try:
        return bytes(_ALPHABET[character] for character in token)
    except KeyError:  # no encoding gives it; the format says that it stands for itself
        return token.encode()
