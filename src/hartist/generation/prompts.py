"""What a prompt may be"""

from __future__ import annotations

from hartist.errors import UserError, quoted

MAX_PROMPT_CHARACTERS = 20_000


def check_prompt(prompt: str | int) -> None:
    """Raise a UserError for an empty or absurdly long prompt."""
    text = str(prompt)
    if not text.strip():
        raise UserError("the prompt is empty; describe the picture you want")
    check_text(text, "the prompt")


def check_text(text: str, what: str) -> None:
    """Raise a UserError for what no text encoder can be given."""
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise UserError(f"{what} has {len(text)} characters; shorten it to {MAX_PROMPT_CHARACTERS}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{what} {quoted(text)} holds bytes that are no UTF-8 text; write them anew")
