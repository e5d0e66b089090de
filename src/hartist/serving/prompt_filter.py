"""Which prompts are turned away: a list of words and phrases, by default a short one of our own

A prompt is compared by whole words, after undoing what is written to slip past a list but read all the same by people
and text encoders: compatibility forms, accents, invisible characters, digits for letters, spaced-out letters.
"""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Protocol, runtime_checkable

from hartist.errors import UserError, quoted

Pattern = re.Pattern[str]

LEET = str.maketrans("013457@$!", "oieastasi")
"""Digits and signs that stand for letters inside words."""
UNSEEN = re.compile("[\u0300-\u036f\u115f\u1160\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]")
"""Accents of European letters (in other scripts, marks are part of the word) and marks that show nothing."""


@runtime_checkable
class PromptFilter(Protocol):
    """Decides on prompts before anything is made of them."""

    async def allows(self, prompt: str) -> bool: ...


class AllowAll:
    """No filter."""

    async def allows(self, prompt: str) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class WordFilter:
    """A prompt is turned away if, for any of the rules, it matches every one of the rule's patterns."""

    rules: tuple[tuple[Pattern, ...], ...]
    harmless: tuple[Pattern, ...] = ()
    """Phrases that are taken out of a prompt before it is compared."""

    @classmethod
    def load(cls, own: str | os.PathLike[str] | None = None) -> WordFilter:
        """The built-in list (`blocked_words.txt` beside this file explains the form), and an operator's own on top.

        Raises UserError, naming the line, for a file that can't be read or understood.
        """
        text = (resources.files("hartist.serving") / "blocked_words.txt").read_text(encoding="utf-8")
        lists = {"the built-in list": text}
        if own is not None:
            try:
                lists[str(own)] = Path(own).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{own} cannot be read ({error}); give a text file with a word a line") from error
        return cls.parse(lists)

    @classmethod
    def parse(cls, lists: dict[str, str]) -> WordFilter:
        """From the text of lists by their names; they share their groups. Raises UserError."""
        lines = [
            (f"{name} line {number}", line.partition("#")[0].strip())
            for name, text in lists.items()
            for number, line in enumerate(text.split("\n"), start=1)
        ]
        groups: dict[str, list[str]] = {}
        rules: list[tuple[Pattern, ...]] = []
        harmless: list[Pattern] = []
        # Groups first: what a list adds to a group of an earlier one counts there too.
        for place, line in sorted(lines, key=lambda entry: "=" not in entry[1]):
            try:
                if "=" in line:
                    name, _, members = line.partition("=")
                    groups.setdefault(_group(name.strip()), []).extend(_alternatives(members, groups))
                elif line.startswith("-"):
                    harmless.append(_compile(line[1:], groups))
                elif line:
                    rules.append(tuple(_compile(part, groups) for part in line.split("+")))
            except ValueError as error:
                raise UserError(f"{place}: {error}; write a word or a phrase") from error
        return cls(tuple(rules), tuple(harmless))

    async def allows(self, prompt: str) -> bool:
        """Whether no rule applies."""
        forms = readings(prompt)
        for pattern in self.harmless:
            forms = [pattern.sub(" ", form) for form in forms]
        return not any(all(any(part.search(form) for form in forms) for part in rule) for rule in self.rules)


def readings(prompt: str) -> list[str]:
    """The ways to read a prompt, each as lower-case words with one space between, before and after.

    >>> readings("P0rn, c\\u00e1fe!")
    [' p0rn cafe ', ' porn cafei ']
    """
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", prompt).casefold())
    text = "".join(c for c in text if c.isspace() or unicodedata.category(c) not in ("Cf", "Cc"))
    text = unicodedata.normalize("NFC", UNSEEN.sub("", text))
    leet = " ".join(chunk.translate(LEET) if any(map(str.isalpha, chunk)) else chunk for chunk in text.split())
    plain = _words(text)
    joined = re.sub(r" \w(?: \w){2,}(?= )", lambda run: " " + run[0].replace(" ", ""), plain)
    return list(dict.fromkeys([plain, _words(leet), joined]))


def _words(text: str) -> str:
    """Letters, marks and digits, everything else a space."""
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return f" {' '.join(kept.split())} "


def _group(name: str) -> str:
    if not re.fullmatch(r"@\w+", name):
        raise ValueError(f"{quoted(name)} is no name of a group, which begins with @")
    return name


def _alternatives(text: str, groups: dict[str, list[str]]) -> list[str]:
    """`a | b c | d* | @group` as regular expressions. Raises ValueError."""
    found: list[str] = []
    for part in map(str.strip, text.split("|")):
        if part.startswith("@"):
            if _group(part) not in groups:
                raise ValueError(f"there is no group {quoted(part)}")
            found += groups[part]
            continue
        words = readings(part.removesuffix("*"))[0].strip()
        if not words:
            raise ValueError(f"{quoted(part)} has no letters")
        found.append(re.escape(words) + (r"\S*" if part.endswith("*") else ""))
    return found


def _compile(text: str, groups: dict[str, list[str]]) -> Pattern:
    return re.compile(rf" (?:{'|'.join(_alternatives(text, groups))})(?= )")
