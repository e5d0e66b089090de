"""Figures by judges: GenEval's and DPG-Bench's, picture by picture

A judge is the slowest part of a run, so every verdict is written down at once, under what it depends on: an
interruption costs one picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from hartist.evaluation.benchmarks.base import Item
from hartist.evaluation.feature_cache import digest
from hartist.evaluation.harness.pictures import read_generated
from hartist.evaluation.harness.rows import Findings, slug
from hartist.evaluation.harness.score import Material
from hartist.evaluation.judges import dpg, geneval
from hartist.evaluation.judges.base import Answerer, ColourJudge, Detector
from hartist.files import write_bytes


@dataclass(frozen=True)
class GenEvalScorer:
    """Share of correct pictures by tag; overall the mean of the tags, as published, and of all pictures."""

    detector: Detector
    colours: ColourJudge

    def __call__(self, material: Material, findings: Findings) -> None:
        judge = f"{self.detector.name} and {self.colours.name}"

        def verdict(picture: UInt8[Tensor, "h w 3"], item: Item) -> list[bool]:
            return [geneval.judge(picture, item.facts, self.detector, self.colours).correct]

        correct = [found[0] for found in verdicts(material, judge, verdict)]
        summary = geneval.summarise([item.category for item in findings.items], correct)
        rows = findings.add_rows(f"geneval {judge}", {"values": torch.tensor(correct).float()})
        findings.add("geneval", judge, None, summary.overall, len(correct), "higher")
        findings.add("geneval_pictures", judge, None, summary.pictures, len(correct), "higher", "mean", rows)
        for tag, share in summary.tags.items():
            count = sum(item.category == tag for item in findings.items)
            findings.add("geneval", judge, tag, share, count, "higher", "mean", rows)


@dataclass(frozen=True)
class DpgScorer:
    """DPG-Bench's score, and the averages of its broad categories of questions."""

    answerer: Answerer

    def __call__(self, material: Material, findings: Findings) -> None:
        questions = [dpg.read_questions(item.facts) for item in findings.items]
        by_id = {item.id: own for item, own in zip(findings.items, questions, strict=True)}

        def answers(picture: UInt8[Tensor, "h w 3"], item: Item) -> list[bool]:
            return list(dpg.judge(picture, by_id[item.id], self.answerer).yes)

        found = verdicts(material, self.answerer.name, answers)
        scores = [100 * dpg.score(own, yes) for own, yes in zip(questions, found, strict=True)]
        findings.add_means("dpg", self.answerer.name, torch.tensor(scores))
        for category, share in dpg.category_scores(zip(questions, found, strict=True)).items():
            findings.add(f"dpg_{slug(category)}", self.answerer.name, None, share, len(found), "higher")


def verdicts(
    material: Material, judge: str, decide: Callable[[UInt8[Tensor, "h w 3"], Item], list[bool]]
) -> list[list[bool]]:
    """Every picture's verdict, in the order of the items. What was written down before is not asked for again."""
    path = material.cache / f"{slug(judge)}.jsonl"
    known = read_verdicts(path)
    found = []
    pictures = read_generated(material.paths, material.size)
    with (
        path.open("ab") as file,
        tqdm(total=len(material.items), desc=judge, unit="img", disable=not material.progress) as bar,
    ):
        for item, picture in zip(material.items, pictures, strict=True):
            key = digest(json.dumps(dict(item.facts), sort_keys=True).encode() + picture.numpy().tobytes()).hex()
            if key not in known:
                known[key] = decide(picture, item)
                file.write(json.dumps({"key": key, "verdict": known[key]}).encode() + b"\n")
                file.flush()
            found.append(known[key])
            bar.update()
    return found


def read_verdicts(path: Path) -> dict[str, list[bool]]:
    """What is written down; a line that a killed process left unfinished is cut off."""
    whole = path.read_bytes() if path.exists() else b""
    good = whole[: whole.rfind(b"\n") + 1]
    if len(good) < len(whole) or not path.exists():
        write_bytes(path, good)
    known: dict[str, list[bool]] = {}
    for line in good.splitlines():
        row: dict[str, Any] = json.loads(line)
        known[row["key"]] = row["verdict"]
    return known
