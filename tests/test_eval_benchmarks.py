"""Every benchmark from its folder to its figures, on miniatures of the public layouts, with a tiny model."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evaluations import PROMPTS, evaluate, picture, use_stand_ins, write_emoji
from hartist import UserError
from hartist.evaluation.benchmarks.dpg import Dpg
from hartist.evaluation.benchmarks.emoji import Emoji
from hartist.evaluation.benchmarks.mjhq import Mjhq
from hartist.evaluation.benchmarks.names import BENCHMARKS, open_benchmark
from hartist.evaluation.benchmarks.prompts import Prompts
from hartist.evaluation.harness import prepare
from hartist.evaluation.harness.result import Result, read_result
from hartist.evaluation.judges.base import Detection
from tiny import NUM_CLASSES, write_tiny_class_model, write_tiny_text_model

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_text_model(tmp_path_factory.mktemp("benchmarks") / "text")


@pytest.fixture(scope="module")
def class_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_class_model(tmp_path_factory.mktemp("benchmarks") / "class")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_ins(monkeypatch.setattr)


def run(model: Path, benchmark: str, data: Path, out: Path, *flags: object) -> Result:
    assert evaluate(model, benchmark, data, out, *flags) == 0
    return read_result(out)


def failure(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line that an evaluation ends with which can't be done."""
    assert evaluate(*arguments) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r"hartist: error: [^\n]+\n", message), message
    return message


def values(result: Result) -> dict[tuple[str, str | None], float]:
    return {(figure.metric, figure.category): figure.value for figure in result.figures}


# --- emoji ----------------------------------------------------------------------------------------


def test_emoji_compares_held_out_prompts_with_their_pictures_by_kind(model: Path, tmp_path: Path) -> None:
    data = write_emoji(tmp_path / "emoji")
    items = Emoji(data).items()
    assert {item.category: sum(other.category == item.category for other in items) for item in items} == {
        "train": 8,
        "unseen_pair": 4,
        "unseen_concept": 4,
    }
    twins = [item for item in items if item.prompt == f"{PROMPTS[0]} validation"]
    assert sorted(item.index for item in twins) == [0, 1]
    assert all(item.reference is not None and item.reference.stem == item.id for item in items)
    metrics = ("--metrics", "frechet,kernel,precision,recall,diversity")
    result = run(model, "emoji", data, tmp_path / "out", "--limit", 4, *metrics)
    assert result.pictures == 12
    found = values(result)
    for category in (None, "train", "unseen_pair", "unseen_concept"):
        for metric in ("fid", "kid", "precision", "recall", "diversity"):
            assert (metric, category) in found or metric in ("precision", "recall")
        assert found["fid", category] > 0


# --- MJHQ -----------------------------------------------------------------------------------------


def write_mjhq(root: Path, inner: str = "") -> Path:
    """Two categories of three pictures, and one prompt that both have."""
    entries = {}
    for i, category in enumerate(("animals", "food")):
        for j in range(3):
            name = f"{i}{j}abc"
            prompt = "a red apple" if j == 0 else f"{PROMPTS[j + 1]} {category}"
            entries[name] = {"category": category, "prompt": prompt}
            picture(root / inner / category / f"{name}.jpg", 10 * i + j, (48, 48))
    (root / "meta_data.json").write_text(json.dumps(entries))
    return root


def test_mjhq_has_figures_overall_and_by_category(model: Path, tmp_path: Path) -> None:
    data = write_mjhq(tmp_path / "mjhq")
    result = run(model, "mjhq", data, tmp_path / "out")
    assert (result.pictures, result.categories) == (6, ("animals", "food"))
    found = values(result)
    for metric in ("fid", "kid", "clip_score"):
        assert {(metric, None), (metric, "animals"), (metric, "food")} <= set(found)
    clip = [found["clip_score", category] for category in (None, "animals", "food")]
    assert clip[0] == pytest.approx((clip[1] + clip[2]) / 2, rel=1e-5)
    assert [item.index for item in Mjhq(data).items() if item.prompt == "a red apple"] == [0, 1]
    inner = write_mjhq(tmp_path / "unzipped", "mjhq30k_imgs")
    assert [item.id for item in Mjhq(inner).items()] == [item.id for item in Mjhq(data).items()]
    assert len(Mjhq(data, limit=2, per_prompt=3).items()) == 12


# --- ImageNet -------------------------------------------------------------------------------------


def test_imagenet_makes_as_many_of_each_class(class_model: Path, tmp_path: Path) -> None:
    real = tmp_path / "real"
    for i in range(6):
        picture(real / f"n{i % 2}" / f"{i}.JPEG", i)
    flags = ("--classes", NUM_CLASSES, "--per-prompt", 2)
    result = run(class_model, "imagenet", real, tmp_path / "out", *flags)
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert len({line["seed"] for line in lines}) == 10
    found = values(result)
    assert {"fid", "inception_score"} <= {metric for metric, _ in found}
    assert {figure.network for figure in result.figures} == {"inception-tensorflow"}  # the published figures' resizing
    rows = next((tmp_path / "out" / "rows").iterdir())
    again = run(class_model, "imagenet", rows, tmp_path / "again", *flags)
    assert values(again) == found


def test_imagenet_refuses_features_of_another_network(
    class_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    flags = ("--classes", 2, "--per-prompt", 2, "--metrics", "frechet")
    for tensors, metadata, part in (
        ({"reference": torch.zeros(4, 27)}, {"network": "other-1"}, "features of other-1"),
        ({"features": torch.zeros(4, 5)}, None, "holds 5 features a picture"),
        ({"weights": torch.zeros(4, 5)}, None, "holds no features"),
    ):
        save_file(tensors, tmp_path / "f.safetensors", metadata)
        out = tmp_path / "out"
        assert part in failure(capsys, class_model, "imagenet", tmp_path / "f.safetensors", out, *flags)


# --- GenEval --------------------------------------------------------------------------------------


def write_geneval(root: Path) -> Path:
    rows = [
        {"tag": tag, "include": [{"class": "apple", "count": 1 + (tag == "counting")}], "prompt": f"a red apple {tag}"}
        for tag in TAGS
    ]
    root.mkdir()
    (root / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return root


class FakeDetector:
    """Sees one apple in dark pictures, two in bright ones."""

    name = "fake detector"
    labels = frozenset({"apple"})
    asked = 0

    def detect(self, picture_HW3: Tensor, threshold: float) -> list[Detection]:
        type(self).asked += 1
        apples = 2 if picture_HW3.float().mean() > 128 else 1
        return [Detection("apple", 0.95, (float(i), 0.0, i + 9.0, 9.0)) for i in range(apples)]


class FakeColours:
    name = "fake colours"

    def colours(self, picture_HW3: Tensor, found: Sequence[Detection], colours: Sequence[str]) -> list[str]:
        return ["red"] * len(found)


def test_geneval_judges_four_pictures_a_prompt(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "load_detector", lambda *_: FakeDetector())
    monkeypatch.setattr(prepare, "ClipColours", lambda *_: FakeColours())
    data = write_geneval(tmp_path / "geneval")
    result = run(model, "geneval", data, tmp_path / "out")
    assert (result.pictures, result.categories) == (24, TAGS)
    found = values(result)
    assert [found["geneval", tag] for tag in TAGS if tag != "counting"] == [1] * 5
    assert found["geneval", None] == pytest.approx((5 + found["geneval", "counting"]) / 6)
    assert found["geneval_pictures", None] == pytest.approx((20 + 4 * found["geneval", "counting"]) / 24)
    assert {figure.network for figure in result.figures} == {"fake detector and fake colours"}
    asked = FakeDetector.asked
    (tmp_path / "out" / "result.json").unlink()
    written = next((tmp_path / "out" / "cache").rglob("*.jsonl"))
    written.write_bytes(written.read_bytes()[:-20])  # as a killed process leaves it
    assert values(run(model, "geneval", data, tmp_path / "out")) == found
    assert FakeDetector.asked == asked + 1


# --- DPG-Bench ------------------------------------------------------------------------------------


def write_dpg(root: Path) -> Path:
    (root / "prompts").mkdir(parents=True)
    columns = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed"]
    with (root / "dpg_bench.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow([*columns, "tuple", "question_natural_language"])
        for i, prompt in enumerate(PROMPTS[:2]):
            (root / "prompts" / f"item{i}.txt").write_text(prompt + "\n")
            entity = [f"item{i}", prompt, "", 1, "0", "entity", "whole", "entity - whole (apple)", "Is there an apple?"]
            colour = [f"item{i}", prompt, "", 2, "1", "attribute", "color", "attribute - color (red)", "Is it red?"]
            table.writerows([entity, colour])
    return root


class FakeAnswerer:
    """There is an apple, and it is not red."""

    name = "fake answerer"

    def answer(self, picture_HW3: Tensor, questions: Sequence[str]) -> list[str]:
        return ["yes" if "apple" in question else "no" for question in questions]


def test_dpg_asks_its_questions_about_four_pictures_a_prompt(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "load_answerer", lambda *_: FakeAnswerer())
    data = write_dpg(tmp_path / "dpg")
    assert [question["depends_on"] for question in Dpg(data).items()[0].facts["questions"]] == [[], [1]]
    result = run(model, "dpg", data, tmp_path / "out")
    assert result.pictures == 8
    assert values(result) == {("dpg", None): 50, ("dpg_entity", None): 100, ("dpg_attribute", None): 0}


# --- files of prompts -----------------------------------------------------------------------------


def test_prompts_come_from_the_files_that_people_have(model: Path, tmp_path: Path) -> None:
    tsv = tmp_path / "PartiPrompts.tsv"
    tsv.write_text(
        'Prompt\tCategory\tChallenge\tNote\na "red" apple\tFood & Beverage\tBasic\t\n42\tAbstract\tBasic\t\n'
    )
    assert [(i.prompt, i.category) for i in Prompts(tsv).items()] == [
        ('a "red" apple', "Food & Beverage"),
        ("42", "Abstract"),
    ]
    hps = tmp_path / "hps"
    hps.mkdir()
    for style in ("anime", "photo"):
        (hps / f"{style}.json").write_text(json.dumps([f"a cat {style}", "a table"]))
    found = [(i.prompt, i.category, i.index) for i in Prompts(hps, per_prompt=2).items()]
    assert found[:2] == [("a cat anime", "anime", 0), ("a cat anime", "anime", 1)]
    assert found[-2:] == [("a table", "photo", 2), ("a table", "photo", 3)]  # its second occurrence
    lines = tmp_path / "own.jsonl"
    lines.write_text('{"prompt": "a cat", "category": "x"}\n\n{"prompt": "a table"}\n')
    assert [(i.prompt, i.category) for i in Prompts(lines).items()] == [("a cat", "x"), ("a table", "")]
    (tmp_path / "own.txt").write_text("a cat\na table\n")
    assert [i.prompt for i in Prompts(tmp_path / "own.txt").items()] == ["a cat", "a table"]
    result = run(model, "prompts", tsv, tmp_path / "out", "--metrics", "clip,clip-h")
    assert result.categories == ("Food & Beverage", "Abstract")
    assert {figure.network for figure in result.figures} == {"CLIP clip-vit-l-14", "CLIP clip-vit-h-14"}


# --- what can't be done ---------------------------------------------------------------------------


def broken(name: str) -> Callable[[Path], Path]:
    """A maker of data that are not as they must be, by name."""

    def make(root: Path) -> Path:
        kinds: dict[str, Callable[[], Any]] = {
            "nothing": lambda: root.mkdir(),
            "mjhq without a category's folder": lambda: (root.mkdir(), mjhq_meta(root)),
            "mjhq without a picture": lambda: next(write_mjhq(root).rglob("*.jpg")).unlink(),
            "mjhq of another form": lambda: (root.mkdir(), (root / "meta_data.json").write_text('{"a": "b"}')),
            "one picture": lambda: picture(root / "a.png", 1),
            "mixed sizes": lambda: [picture(root / f"{i}.png", i, (32, 32 + i // 3)) for i in range(4)],
            "no picture": lambda: [
                root.mkdir(),
                (root / "a.png").write_bytes(b"x"),
                (root / "b.png").write_bytes(b"x"),
            ],
            "geneval that is no JSON": lambda: (write_geneval(root) / "evaluation_metadata.jsonl").write_text("{"),
            "geneval without objects": lambda: (write_geneval(root) / "evaluation_metadata.jsonl").write_text(
                '{"tag": "colors", "prompt": "a cat"}'
            ),
            "dpg without questions": lambda: (write_dpg(root) / "prompts" / "item9.txt").write_text("a cat"),
            "dpg of another form": lambda: (write_dpg(root) / "dpg_bench.csv").write_text("a,b\n1,2\n"),
            "dpg with a damaged row": lambda: (write_dpg(root) / "dpg_bench.csv").write_text(
                "item_id,proposition_id,dependency,tuple,question_natural_language\nitem0,one,0,a,b\n"
            ),
            "prompts that are none": lambda: (root.mkdir(), (root / "a.json").write_text("[1]")),
        }
        kinds[name]()
        return root

    return make


def mjhq_meta(root: Path) -> None:
    (root / "meta_data.json").write_text('{"a": {"category": "food", "prompt": "a cat"}}')


@pytest.mark.parametrize(
    ("benchmark", "data", "part"),
    [
        ("emoji", "nothing", "hartist data emoji"),
        ("mjhq", "nothing", "no MJHQ-30K folder"),
        ("mjhq", "mjhq of another form", "is not of MJHQ-30K"),
        ("mjhq", "mjhq without a category's folder", "unzip mjhq30k_imgs.zip"),
        ("mjhq", "mjhq without a picture", "lacks the picture"),
        ("imagenet", "nothing", "has no pictures"),
        ("imagenet", "one picture", "has 1 picture"),
        ("imagenet", "mixed sizes", "mixed sizes: 0.png is 32×32, 3.png 32×33"),
        ("imagenet", "no picture", "a.png cannot be read as an image"),
        ("geneval", "nothing", "evaluation_metadata.jsonl does not exist"),
        ("geneval", "geneval that is no JSON", "line 1 is not JSON"),
        ("geneval", "geneval without objects", "include and exclude"),
        ("dpg", "nothing", "no DPG-Bench folder"),
        ("dpg", "dpg without questions", "no questions for prompts/item9.txt"),
        ("dpg", "dpg of another form", "its columns must be"),
        ("dpg", "dpg with a damaged row", "row 1 ('item0') is damaged"),
        ("prompts", "nothing", "holds no file of prompts"),
        ("prompts", "prompts that are none", "prompt 1 is 1"),
    ],
)
def test_a_wrong_folder_is_one_line(
    benchmark: str, data: str, part: str, class_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = broken(data)(tmp_path / "data")
    assert part in failure(capsys, class_model, benchmark, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_real_pictures_of_mixed_sizes_can_be_cropped(class_model: Path, tmp_path: Path) -> None:
    data = broken("mixed sizes")(tmp_path / "data")
    flags = ("--crop", "--classes", 2, "--per-prompt", 1, "--metrics", "frechet")
    assert run(class_model, "imagenet", data, tmp_path / "out", *flags).pictures == 2


def test_too_few_pictures_are_one_line(class_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(2):
        picture(tmp_path / "real" / f"{i}.png", i)
    flags = ("--classes", 1, "--per-prompt", 1, "--metrics", "frechet")
    message = failure(capsys, class_model, "imagenet", tmp_path / "real", tmp_path / "out", *flags)
    assert "too few generated pictures to compare (1)" in message
    message = failure(capsys, class_model, "imagenet", tmp_path / "none", tmp_path / "out")
    assert "none does not exist" in message


def test_a_prompt_that_the_model_cannot_serve_is_named(
    class_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    flags = ("--metrics", "none")
    message = failure(capsys, class_model, "prompts", tmp_path / "p.txt", tmp_path / "out", *flags)
    assert "'a cat' is not a class of this model" in message
    for i in range(2):
        picture(tmp_path / "real" / f"{i}.png", i)
    message = failure(capsys, class_model, "imagenet", tmp_path / "real", tmp_path / "out", *flags)
    assert "5 is not a class of this model" in message


def test_judgements_of_one_benchmark_make_no_sense_on_another(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    for metrics, part in (("dpg", "not on prompts"), ("fid", "prompts has none")):
        flags = ("--metrics", metrics)
        assert part in failure(capsys, model, "prompts", tmp_path / "p.txt", tmp_path / "out", *flags)


def test_every_benchmark_has_a_title_and_knows_its_metrics(tmp_path: Path) -> None:
    from hartist.evaluation.harness.metrics import METRICS

    for name in BENCHMARKS:
        benchmark = open_benchmark(name, tmp_path)
        assert benchmark.name == name
        assert benchmark.title
        assert set(benchmark.metrics()) <= set(METRICS)
    with pytest.raises(UserError, match="no benchmark 'x'"):
        open_benchmark("x", tmp_path)
