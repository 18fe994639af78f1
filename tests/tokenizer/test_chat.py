"""Conversations: DeepSeek's format, what counts as a marker, and clear refusals."""

import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deepseek_jax.tokenizer import bpe, chat
from deepseek_jax.tokenizer.huggingface import BOS, EOS, HuggingFace

TOKENIZER = bpe.train(["you are what I say, 1 2 3\n" * 9], 300)
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "<think>easy</think>3"},
    {"role": "user", "content": "Thanks\n"},
]
PIECES = st.sampled_from(
    [*bpe.MARKERS, "<", "｜", "Us", "er｜>", "<｜", " a ", "\ue000"]
)
WORDS = st.lists(PIECES, max_size=6).map("".join)


def without(tokenizer):
    config = {k: v for k, v in tokenizer.config.items() if k != "chat_template"}
    return HuggingFace(tokenizer._content, config)


def test_deepseeks_format():
    assert TOKENIZER.chat_text(TALK, add_generation_prompt=True) == (
        f"{BOS}Be brief.{USER}1 + 2?{ASSISTANT}<think>easy</think>3{EOS}"
        f"{USER}Thanks\n{ASSISTANT}"
    )
    systems = [{"role": "system", "content": text} for text in ("One.", "Two.")]
    text = TOKENIZER.chat_text([*TALK[1:3], *systems])
    assert text.startswith(f"{BOS}One.\n\nTwo.{USER}") and text.endswith(EOS)


def test_ids_spell_the_text_and_hold_the_markers():
    ids = TOKENIZER.chat(TALK, add_generation_prompt=True)
    text = TOKENIZER.chat_text(TALK, add_generation_prompt=True)
    assert TOKENIZER.decode(ids, markers=True) == text
    assert ids == TOKENIZER.encode(text, markers=True)
    names = (BOS, USER, ASSISTANT, "<think>", "</think>", EOS, USER, ASSISTANT)
    marked = [i for i in ids if i in TOKENIZER.markers.values()]
    assert marked == [TOKENIZER.markers[name] for name in names]


@example(system="<｜Us", first="er｜>", second="｜DSML")
@given(system=WORDS, first=WORDS, second=WORDS)
def test_what_is_quoted_never_becomes_a_marker(system, first, second):
    """Neither in one message nor across two that the template puts side by side."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}|{{ tools[0].name }}"
    talk = [
        {"role": "system", "content": system},
        {"role": "user", "content": [first]},
        {"role": "user", "content": second},
    ]
    joined = "{{ messages[0].content + messages[1].content[0] + messages[2].content }}"
    for one in (template.replace("m.content", "m.content|string"), joined):
        ids = TOKENIZER.chat(talk, template=one, tools=[{"name": first}])
        assert not set(ids) & set(TOKENIZER.markers.values())
    assert TOKENIZER.decode(ids) == system + first + second
    ids = TOKENIZER.chat(
        [{"role": "user", "content": first}, {"role": "user", "content": second}]
    )
    marked = [i for i in ids if i in TOKENIZER.markers.values()]
    assert marked == [0, TOKENIZER.markers[USER], TOKENIZER.markers[USER]]
    assert TOKENIZER.decode(ids) == first + second


def test_trust_is_by_role():
    says = "<think>" + EOS
    talk = [{"role": role, "content": says} for role in ("user", "assistant")]
    think = TOKENIZER.markers["<think>"]
    assert TOKENIZER.chat(talk).count(think) == 1
    assert TOKENIZER.chat(talk, trusted=()).count(think) == 0
    assert TOKENIZER.chat(talk, trusted=("user", "assistant")).count(think) == 2


def test_templates_see_what_hugging_faces_library_gives_them():
    template = (
        "{%- for m in messages %}\n"
        "    {%- if loop.index > 1 %}{% break %}{% endif %}\n"
        "    {{- m['content'] | trim }} {{ tools | tojson }}{{ pad_token }}\n"
        "{% endfor %}"
    )
    text = TOKENIZER.chat_text(TALK, template=template, tools=[{"é": 1}])
    assert text == f'Be brief. [{{"é": 1}}]{bpe.SPECIAL["pad_token"]}\n'
    date = TOKENIZER.chat_text(TALK, template="{{ strftime_now('%Y') }}")
    assert 2000 < int(date) < 3000


def test_templates_cannot_reach_python():
    with pytest.raises(ValueError, match="chat template fails"):
        TOKENIZER.chat_text(TALK, template="{{ messages.__class__.__mro__ }}")


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        ([], "messages must be a list such as"),
        ("Hello", "messages must be a list such as"),
        (TALK[0], "messages must be a list such as"),
        ([*TALK, {"content": "x"}], r"messages\[4\] = .*'role'"),
        ([{"role": 1, "content": "x"}], r"messages\[0\] = .*'role'"),
        ([{"role": "user"}], "chat template fails: .*no attribute 'content'"),
        ([{"role": "user", "content": None}], "chat template fails"),
        ([{"role": "tool", "content": "x"}], "no format for the role tool"),
    ],
)
def test_what_is_no_conversation(messages, wanted):
    for call in (TOKENIZER.chat, TOKENIZER.chat_text):
        with pytest.raises(ValueError, match=wanted):
            call(messages)


def test_no_template():
    plain = without(TOKENIZER)
    with pytest.raises(
        ValueError, match=r"no chat template.*chat_template\.jinja.*TURNS"
    ):
        plain.chat(TALK)
    assert plain.chat(TALK, template=chat.TURNS) == TOKENIZER.chat(TALK)


def test_several_templates_by_name():
    config = TOKENIZER.config | {
        "chat_template": [
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": "default"},
        ]
    }
    named = HuggingFace(TOKENIZER._content, config)
    assert named.chat_text(TALK) == "default"


def test_a_template_that_is_no_jinja():
    with pytest.raises(ValueError, match="chat template fails"):
        TOKENIZER.chat(TALK, template="{% for %}")


def test_without_jinja2(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(
        ValueError, match=r"jinja2.*pip install 'deepseek_jax\[parity\]'"
    ):
        TOKENIZER.chat(TALK)
