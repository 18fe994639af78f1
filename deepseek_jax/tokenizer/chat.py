"""Conversations as text, by a Jinja chat template in Hugging Face's manner.

What users, systems and tools say may spell a marker such as <｜Assistant｜>. It must
not become one: `Guard` breaks those spellings up before the template runs, and the text
between the template's own markers is mended afterwards. Templates see the variables
that they see in Hugging Face's library.
"""

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deepseek_jax.tokenizer.base import need_package

Message = Mapping[str, Any]  # role, content, and whatever the template asks for

# The format of DeepSeek-V3's plain conversations: the systems' prompts first, then
# turns, the assistant's closed by eos. Its released template also formats tool calls.
TURNS = (
    "{{ bos_token }}"
    "{% for message in messages if message.role == 'system' %}"
    "{{ message.content + ('' if loop.last else '\\n\\n') }}"
    "{% endfor %}"
    "{% for message in messages if message.role != 'system' %}"
    "{% if message.role == 'user' %}{{ '<｜User｜>' + message.content }}"
    "{% elif message.role == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message.content + eos_token }}"
    "{% else %}{{ raise_exception('no format for the role ' ~ message.role) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)


class Guard:
    """Splits text at markers, and keeps quoted text from being split.

    A guard is a private-use character that no text at hand holds; a marker (of at least
    two characters) with one inside is none.
    """

    def __init__(self, markers: Iterable[str]):
        longest = sorted(markers, key=lambda name: (-len(name), name))
        self._markers = re.compile(f"({'|'.join(map(re.escape, longest)) or '(?!)'})")
        self._starts = {name[:n] for name in longest for n in range(1, len(name))}
        self._length = max(map(len, longest), default=0)

    def split(self, text: str) -> list[str]:
        """Text, marker, text, ... marker, text; the longest of the leftmost counts."""
        return self._markers.split(text)

    def quoted(self, value: Any, guard: str) -> Any:
        """`value` with every string in it made harmless by `guard`."""
        if isinstance(value, str):
            return self._quoted(value, guard)
        if isinstance(value, Mapping):
            return {key: self.quoted(item, guard) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.quoted(item, guard) for item in value]
        return value

    def _quoted(self, text: str, guard: str) -> str:
        while self._markers.search(text):  # markers may overlap
            text = self._markers.sub(lambda m: m[0][0] + guard + m[0][1:], text)
        # An end that could open a marker must not meet the rest of it.
        ends = (text[-n:] for n in range(1, self._length))
        return text + guard if any(end in self._starts for end in ends) else text


def free_character(text: str) -> str:
    """A private-use character that `text` does not hold."""
    used = set(text)
    return next(chr(i) for i in range(0xE000, 0x110000) if chr(i) not in used)


def check(messages: Sequence[Message]) -> None:
    """Refuses what is no conversation.

    Raises:
      ValueError: names the message and what is wrong with it.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise ValueError(
            "messages must be a list such as [{'role': 'user', 'content': 'Hello'}]"
        )
    for number, message in enumerate(messages):
        if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
            raise ValueError(
                f"messages[{number}] = {message!r:.80}: must be a dict with 'role', a "
                "string, and 'content'"
            )


def render(template: str, **variables: Any) -> str:
    """The text of a template.

    Raises:
      ValueError: jinja2 is not installed, the template is not Jinja, or refuses the
        messages.
    """
    need_package("jinja2", "a chat template")
    import jinja2

    try:
        return str(_environment().from_string(template).render(**variables))
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise ValueError(f"the chat template fails: {error}") from None


def _environment() -> Any:
    """The environment that templates are written for, without access to Python."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, ensure_ascii=False, **options
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = datetime.datetime.now().strftime
    return environment
