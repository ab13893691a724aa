"""Chats as a model reads them, by its chat template: the same text whatever day it is."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# What a template raises for messages that it does not take.
BAD_CHAT = (TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError, NotImplementedError)
# Many templates tell the date. Text of another day would be other text, so all are given this one.
DATE = {"%d": "26", "%-d": "26", "%m": "07", "%b": "Jul", "%B": "July", "%A": "Friday", "%Y": "2024", "%y": "24"}
ONE_DAY = (
    "{%- macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('{code}', '{value}')" for code, value in DATE.items())
    + " }}{% endmacro -%}"
)


def as_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str:
    """The text of a chat. Raises one of ``BAD_CHAT`` if it does not fit the template."""
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = ONE_DAY + template
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert isinstance(text, str)
    return text
