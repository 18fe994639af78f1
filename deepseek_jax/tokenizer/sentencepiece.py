"""SentencePiece BPE with byte fallback, made lossless and safe from injection.

SentencePiece writes a space as U+2581, so that a U+2581 in the text would come back as
a space: such characters are taken out first, and their three bytes put in by number.
Decoding joins the bytes of the pieces, whatever stands beside them. Control symbols are
never matched in text, by SentencePiece's own rule; "\\n" is the only symbol that we
define, because the trainer would end a sentence there.

DeepSeek-V3's tokenizer differs: its pre-tokenizer groups up to three digits and joins
punctuation with line breaks, which SentencePiece can't express; here digits are single.
"""

from pathlib import Path

from sentencepiece import SentencePieceProcessor

from deepseek_jax.files import write_bytes
from deepseek_jax.tokenizer.base import CONTROLS, hash_of, write_about

KIND = "sentencepiece"
MODEL = "sentencepiece.model"
SPACE = "\u2581"  # what SentencePiece writes for a space


class SentencePiece:
    """A trained model, given as the bytes of its file.

    Raises:
      ValueError: bytes that are no SentencePiece model, or one that lacks the control
        symbols or byte pieces that ours have.
    """

    def __init__(self, model: bytes):
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"no SentencePiece model: {error}") from None
        self._model = model
        self.hash = hash_of(KIND, model)
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.pad_id: int = self._processor.pad_id()
        begin, hole, end = (self._processor.piece_to_id(name) for name in CONTROLS)
        self.fim_ids: tuple[int, int, int] = (begin, hole, end)
        self._space = [
            self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()
        ]
        own = {self.bos_id, self.eos_id, self.pad_id, *self.fim_ids, *self._space}
        if (
            len(own) < 6 + len(self._space)
            or self._processor.unk_id() in own
            or -1 in own
        ):
            raise ValueError(
                "a SentencePiece model without our control symbols or bytes"
            )
        self._bytes = [self._piece(i) for i in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        first, *rest = text.split(SPACE)
        ids: list[int] = self._processor.encode(first)
        for part in rest:
            ids += self._space
            ids += self._processor.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        known = (self._bytes[i] for i in ids if i < len(self._bytes))
        return b"".join(known).decode(errors="replace")

    def save(self, folder: str | Path) -> None:
        write_bytes(Path(folder) / MODEL, self._model)
        write_about(Path(folder), KIND, self)

    def _piece(self, number: int) -> bytes:
        """The bytes that a piece stands for, none for control symbols."""
        processor = self._processor
        if processor.is_control(number) or processor.is_unknown(number):
            return b""
        piece: str = processor.id_to_piece(number)
        if processor.is_byte(number):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()
