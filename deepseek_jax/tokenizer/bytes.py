"""A token is a byte of UTF-8. No training: for tests and for text of any alphabet."""

from pathlib import Path

from deepseek_jax.tokenizer.base import CONTROLS, hash_of, write_about

KIND = "bytes"


class Bytes:
    """Ids 0-255 are bytes, then come bos, eos, pad and the FIM ids."""

    bos_id = 256
    eos_id = 257
    pad_id = 258
    fim_ids = (259, 260, 261)
    vocab_size = 259 + len(CONTROLS)
    hash = hash_of(KIND)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def save(self, folder: str | Path) -> None:
        write_about(Path(folder), KIND, self)
