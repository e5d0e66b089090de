"""DPG-Bench's rules: how many of a prompt's statements does a picture show? (Hu et al. 2024, ELLA)

Each prompt comes with questions to be answered yes or no, some of which make sense only if another one, their parent,
is answered yes ("Is there a cat?" before "Is the cat black?"). The authors judge by mPLUG-large (modelscope).

    score of a picture    share of its questions answered yes, where a question with a parent at no counts as no
    score of the bench    mean over prompts of the mean over their pictures
    category averages     share of yes among the category's questions as they were answered, whatever their parents

so the authors' program (TencentQQGYLab/ELLA) computes it. It counts only the last of a prompt's pictures in the
category averages; here all count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from hartist.errors import UserError, quoted
from hartist.evaluation.judges.base import Answerer


@dataclass(frozen=True)
class Question:
    """One statement of a prompt, as a question."""

    id: int
    text: str
    parents: tuple[int, ...] = ()
    """Ids of the questions that must be answered yes."""
    category: str = ""
    """Such as "entity - whole" or "attribute - color"; before the dash the broad one."""

    @property
    def broad(self) -> str:
        """Entity, attribute, relation, global or other."""
        return self.category.partition("-")[0].strip()


@dataclass(frozen=True)
class PictureScore:
    """What a picture got."""

    score: float
    """From 0 to 1."""
    yes: tuple[bool, ...]
    """Its answers in the order of the questions, whatever their parents."""


def read_questions(facts: Mapping[str, Any]) -> list[Question]:
    """The questions of `facts["questions"]`: mappings with id, question, depends_on and category.

    Raises UserError for another form, none at all, or a parent that isn't there.
    """
    try:
        questions = [
            Question(int(row["id"]), str(row["question"]), tuple(map(int, row["depends_on"])), str(row["category"]))
            for row in facts["questions"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"DPG-Bench's questions cannot be read ({error!r}); fetch its table again") from error
    ids = [question.id for question in questions]
    lost = [parent for question in questions for parent in question.parents if parent not in ids]
    if not questions or lost or len(set(ids)) < len(ids):
        what = f"question {lost[0]} is missing" if lost else "there are none" if not questions else "an id comes twice"
        first = quoted(questions[0].text) if questions else "a prompt"
        raise UserError(f"DPG-Bench's questions of {first} cannot be scored ({what}); fetch its table again")
    return questions


def judge(picture_HW3: UInt8[Tensor, "h w 3"], questions: Sequence[Question], answerer: Answerer) -> PictureScore:
    """Ask all questions about a picture and score the answers."""
    answers = answerer.answer(picture_HW3, [question.text for question in questions])
    yes = tuple(is_yes(answer) for answer in answers)
    return PictureScore(score(questions, yes), yes)


def is_yes(answer: str) -> bool:
    """Only "yes" is yes; case, spaces and a closing full stop don't matter."""
    return answer.strip().removesuffix(".").casefold() == "yes"


def score(questions: Sequence[Question], yes: Sequence[bool]) -> float:
    """Share of questions that hold: answered yes, and so are all their parents, and theirs.

    In the questions' order, as the authors do it: a parent that comes after its child counts as it was answered.
    """
    holds = {question.id: answer for question, answer in zip(questions, yes, strict=True)}
    for question in questions:
        holds[question.id] &= all(holds[parent] for parent in question.parents)
    return fmean(holds.values())


def bench_score(scores: Mapping[str, Sequence[float]]) -> float:
    """The benchmark's figure, 0 to 100, from the scores of each prompt's pictures."""
    return 100 * fmean(fmean(own) for own in scores.values())


def category_scores(
    judged: Iterable[tuple[Sequence[Question], Sequence[bool]]], *, broad: bool = True
) -> dict[str, float]:
    """Averages of the categories, 0 to 100, from each picture's questions and answers, sorted by name."""
    answers: dict[str, list[bool]] = {}
    for questions, yes in judged:
        for question, answer in zip(questions, yes, strict=True):
            answers.setdefault(question.broad if broad else question.category, []).append(answer)
    return {category: 100 * fmean(own) for category, own in sorted(answers.items())}
