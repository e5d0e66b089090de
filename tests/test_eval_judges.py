"""Judges: the rules of GenEval and DPG-Bench with judges that say what they are told, and the real loaders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hartist.errors import UserError
from hartist.evaluation.clip import TextImageNetwork
from hartist.evaluation.features import FeatureNetwork
from hartist.evaluation.judges import dpg, geneval
from hartist.evaluation.judges.answering import load_answerer
from hartist.evaluation.judges.base import Box, Detection
from hartist.evaluation.judges.colours import ClipColours, cut_out
from hartist.evaluation.judges.detectors import box_of, load_detector
from hartist.evaluation.judges.dpg import PictureScore, Question
from hartist.evaluation.judges.geneval import COLOURS, MAX_OBJECTS, Verdict, relations, summarise, surest

PICTURE = torch.zeros(100, 100, 3, dtype=torch.uint8)
LEFT: Box = (0.0, 40.0, 20.0, 60.0)
RIGHT: Box = (80.0, 40.0, 100.0, 60.0)
TOP: Box = (40.0, 0.0, 60.0, 20.0)
BOTTOM: Box = (40.0, 80.0, 60.0, 100.0)


@dataclass(frozen=True)
class FakeDetector:
    """Finds what it is told to, sure or not; remembers the threshold."""

    found: Sequence[Detection]
    labels: frozenset[str] = frozenset({"cat", "dog", "bench"})
    name: str = "fake"
    thresholds: list[float] = field(default_factory=list)

    def detect(self, picture_HW3: Tensor, threshold: float) -> list[Detection]:
        self.thresholds.append(threshold)
        return list(self.found)


@dataclass(frozen=True)
class FakeColours:
    """The colour of each box."""

    by_box: Mapping[Box, str] = field(default_factory=dict)
    name: str = "fake"

    def colours(self, picture_HW3: Tensor, found: Sequence[Detection], colours: Sequence[str]) -> list[str]:
        return [self.by_box[detection.box] for detection in found]


def judge(
    include: Sequence[Mapping[str, Any]],
    found: Sequence[Detection],
    *,
    exclude: Sequence[Mapping[str, Any]] = (),
    colours: Mapping[Box, str] | None = None,
    tag: str = "single_object",
) -> Verdict:
    facts = {"tag": tag, "include": include, "exclude": exclude, "prompt": "a photo"}
    return geneval.judge(PICTURE, facts, FakeDetector(found), FakeColours(colours or {}))


def cat(box: Box = LEFT, score: float = 0.95) -> Detection:
    return Detection("cat", score, box)


def dog(box: Box = RIGHT, score: float = 0.95) -> Detection:
    return Detection("dog", score, box)


A_CAT, A_DOG = {"class": "cat", "count": 1}, {"class": "dog", "count": 1}

# --- GenEval --------------------------------------------------------------------------------------


def test_a_single_object_has_to_be_there() -> None:
    assert judge([A_CAT], [cat()]) == Verdict(True, ())
    assert judge([A_CAT], [dog()]) == Verdict(False, ("0 cat of 1",))
    assert judge([A_CAT], [cat(), dog(), cat(RIGHT)]).correct  # what else is there does not matter


def test_two_objects_have_to_be_there_both() -> None:
    assert judge([A_CAT, A_DOG], [cat(), dog()]).correct
    assert not judge([A_CAT, A_DOG], [cat(), cat(RIGHT)]).correct


def test_an_object_counts_above_the_threshold_and_not_at_it() -> None:
    assert judge([A_CAT], [cat(score=0.31)]).correct
    assert not judge([A_CAT], [cat(score=0.3)]).correct


def test_counting_is_exact_and_asks_for_surer_objects() -> None:
    two, three = {"class": "cat", "count": 2}, {"class": "cat", "count": 3}
    boxes = (LEFT, RIGHT, TOP)
    for count, correct in ((1, False), (2, True), (3, False)):
        found = [cat(box) for box in boxes[:count]]
        assert judge([two], found, exclude=[three], tag="counting").correct is correct
    unsure = [cat(LEFT), cat(RIGHT), cat(TOP, 0.9)]  # not above 0.9: not counted
    assert judge([two], unsure, exclude=[three], tag="counting").correct
    assert judge([two], unsure, exclude=[three]).reasons == ("3 cat, 3 or more",)


def test_the_detector_is_asked_with_the_tags_threshold() -> None:
    detector = FakeDetector([cat()])
    for tag in ("counting", "colors"):
        geneval.judge(PICTURE, {"tag": tag, "include": [A_CAT]}, detector, FakeColours())
    assert detector.thresholds == [0.9, 0.3]


def test_of_many_objects_the_surest_sixteen_count() -> None:
    found = [cat((float(i), 0.0, i + 1.0, 1.0), 0.4 + i / 100) for i in range(MAX_OBJECTS + 4)]
    kept = surest(found, 0.3)["cat"]
    assert [detection.score for detection in kept] == sorted((d.score for d in found), reverse=True)[:MAX_OBJECTS]
    seventeen = [{"class": "cat", "count": MAX_OBJECTS + 1}]
    assert judge([A_CAT], found, exclude=seventeen).correct


def test_colour_is_that_of_the_surest_object() -> None:
    red = {**A_CAT, "color": "red"}
    colours = {LEFT: "red", RIGHT: "blue"}
    assert judge([red], [cat(LEFT, 0.9), cat(RIGHT, 0.8)], colours=colours).correct
    assert judge([red], [cat(LEFT, 0.8), cat(RIGHT, 0.9)], colours=colours).reasons == ("cat is blue, not red",)


def test_each_of_two_objects_has_its_own_colour() -> None:
    wanted = [{**A_CAT, "color": "red"}, {**A_DOG, "color": "blue"}]
    found = [cat(), dog()]
    assert judge(wanted, found, colours={LEFT: "red", RIGHT: "blue"}, tag="color_attr").correct
    assert not judge(wanted, found, colours={LEFT: "blue", RIGHT: "red"}, tag="color_attr").correct


def test_place_is_towards_the_target() -> None:
    def at(relation: str) -> list[Mapping[str, Any]]:
        return [A_DOG, {**A_CAT, "position": [relation, 0]}]

    assert judge(at("left of"), [cat(LEFT), dog(RIGHT)]).correct
    assert judge(at("right of"), [cat(LEFT), dog(RIGHT)]).reasons == ("cat is not right of its target",)
    assert judge(at("above"), [cat(TOP), dog(BOTTOM)]).correct
    assert judge(at("left of"), [cat(LEFT)]).reasons == ("0 dog of 1", "nothing there for cat to be left of")


def test_a_target_of_the_wrong_colour_is_no_target() -> None:
    wanted = [{**A_DOG, "color": "red"}, {**A_CAT, "position": ["left of", 0]}]
    verdict = judge(wanted, [cat(LEFT), dog(RIGHT)], colours={RIGHT: "blue"})
    assert verdict.reasons == ("dog is blue, not red", "nothing there for cat to be left of")


def test_all_objects_have_to_be_in_place() -> None:
    wanted = [A_DOG, {"class": "cat", "count": 2, "position": ["left of", 0]}]
    middle: Box = (40.0, 40.0, 60.0, 60.0)
    assert judge(wanted, [cat(LEFT), cat(middle), dog(RIGHT)]).correct
    assert not judge(wanted, [cat(LEFT), cat(RIGHT), dog(middle)]).correct


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (LEFT, RIGHT, {"left of"}),
        (RIGHT, LEFT, {"right of"}),
        (TOP, BOTTOM, {"above"}),
        (BOTTOM, TOP, {"below"}),
        ((0.0, 0.0, 10.0, 10.0), (60.0, 60.0, 70.0, 70.0), {"left of", "above"}),
        (LEFT, LEFT, set()),
        # centres 4 apart, a tenth of both widths is 4: nothing is left
        ((0.0, 0.0, 20.0, 20.0), (4.0, 0.0, 24.0, 20.0), set()),
        # 8 apart: 4 are left, half of the distance, which is not more than half
        ((0.0, 0.0, 20.0, 20.0), (8.0, 0.0, 28.0, 20.0), set()),
        # 9 apart: 5 are left
        ((0.0, 0.0, 20.0, 20.0), (9.0, 0.0, 29.0, 20.0), {"left of"}),
        # by 10 to the left and 40 up: 6/41 and 36/41
        ((0.0, 0.0, 20.0, 20.0), (10.0, 40.0, 30.0, 60.0), {"above"}),
    ],
)
def test_relations_by_hand(a: Box, b: Box, expected: set[str]) -> None:
    assert relations(a, b) == expected


@given(st.lists(st.floats(0, 100), min_size=8, max_size=8))
@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
def test_relations_are_opposite_from_the_other_side(edges: list[float]) -> None:
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    a, b = ((x, y, x + w, y + h) for x, y, w, h in (edges[:4], edges[4:]))
    assert {opposite[name] for name in relations(a, b)} == relations(b, a)


def test_the_overall_score_weighs_tags_alike() -> None:
    score = summarise(["colors", "colors", "colors", "position"], [True, True, False, False])
    assert score.tags == pytest.approx({"colors": 2 / 3, "position": 0})
    assert score.overall == pytest.approx(1 / 3)
    assert score.pictures == 0.5
    with pytest.raises(UserError, match="no pictures"):
        summarise([], [])


@pytest.mark.parametrize(
    ("include", "message"),
    [
        ([{"class": "unicorn", "count": 1}], "fake cannot find 'unicorn'"),
        ([{"class": "cat"}], "GenEval's include of 'a photo' cannot be read"),
        ([{"class": "cat", "count": 0}], "cannot be read"),
        ([{"class": "cat", "count": 1, "position": ["above", 0]}], "cannot be read"),  # no earlier requirement
        ([{"class": "cat", "count": 1, "position": "above"}], "cannot be read"),
        (["cat"], "cannot be read"),
    ],
)
def test_facts_of_another_form_are_named(include: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        judge(include, [cat()])


# --- colours --------------------------------------------------------------------------------------


def paint(box: Box, colour: tuple[int, int, int]) -> tuple[Tensor, Detection]:
    left, top, right, bottom = (int(edge) for edge in box)
    picture = PICTURE.clone()
    picture[top:bottom, left:right] = torch.tensor(colour, dtype=torch.uint8)
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[top:bottom, left : (left + right) // 2] = True
    return picture, Detection("cat", 0.9, box, mask)


def test_an_object_is_cut_out_and_grey_around_its_mask() -> None:
    picture, detection = paint((10.0, 20.0, 30.0, 50.0), (255, 0, 0))
    crop = cut_out(picture, detection)
    assert crop.shape == (30, 20, 3)
    assert (crop[:, :10] == torch.tensor([255, 0, 0])).all()
    assert (crop[:, 10:] == 0x99).all()
    assert (picture[20:50, 20:30] == torch.tensor([255, 0, 0])).all()  # the picture itself is left alone
    for box in ((-5.0, -5.0, 3.0, 3.0), (98.6, 99.9, 130.0, 130.0), (50.2, 50.2, 50.3, 50.3)):
        h, w = cut_out(picture, Detection("cat", 0.9, box)).shape[:2]
        assert h >= 1
        assert w >= 1


def test_clip_colours_pick_the_nearest_sentences() -> None:
    texts: list[str] = []
    basis = dict(zip(COLOURS, torch.eye(len(COLOURS)), strict=True))

    def embed_texts(sentences: Sequence[str]) -> Tensor:
        texts.extend(sentences)
        return torch.stack([next(v for c, v in basis.items() if f" {c}" in sentence) for sentence in sentences])

    def embed_images(pixels: Tensor) -> Tensor:
        mean = pixels.float().mean((0, 1, 2))
        return basis["red" if mean[0] > mean[2] else "blue"][None] + 0.1

    images = FeatureNetwork("tiny", "tiny", embed_images)
    judge = ClipColours(TextImageNetwork("tiny", images, embed_texts))
    picture, red = paint(LEFT, (255, 0, 0))
    picture[40:60, 80:] = torch.tensor([0, 0, 255], dtype=torch.uint8)
    blue = Detection("cat", 0.5, RIGHT)
    assert judge.colours(picture, [red, blue], COLOURS) == ["red", "blue"]
    assert judge.colours(picture, [blue], COLOURS) == ["blue"]
    assert len(texts) == 30  # the sentences of a label are embedded once
    assert texts[:3] == ["a photo of a red cat", "a photo of a red-colored cat", "a photo of a red object"]
    assert judge.colours(picture, [], COLOURS) == []


# --- DPG-Bench ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FakeAnswerer:
    """Answers as its table says."""

    answers: Mapping[str, str]
    name: str = "fake"

    def answer(self, picture_HW3: Tensor, questions: Sequence[str]) -> list[str]:
        return [self.answers[question] for question in questions]


FACTS = {
    "questions": [
        {"id": 1, "question": "Is there a cat?", "depends_on": [], "category": "entity - whole"},
        {"id": 2, "question": "Is it black?", "depends_on": [1], "category": "attribute - color"},
        {"id": 3, "question": "Is its black shiny?", "depends_on": [2], "category": "attribute - texture"},
        {"id": 4, "question": "Is it night?", "depends_on": [], "category": "global"},
    ]
}


@pytest.mark.parametrize(
    ("answers", "score"),
    [
        ("yes yes yes yes", 1.0),
        ("yes no yes yes", 0.5),  # the shine falls with the black
        ("no yes yes yes", 0.25),  # and both with the cat
        ("no no no no", 0.0),
        ("yes yes no yes", 0.75),
    ],
)
def test_a_question_falls_with_its_parents(answers: str, score: float) -> None:
    questions = dpg.read_questions(FACTS)
    table = dict(zip([question.text for question in questions], answers.split(), strict=True))
    found = dpg.judge(PICTURE, questions, FakeAnswerer(table))
    assert found == PictureScore(score, tuple(answer == "yes" for answer in answers.split()))


def test_a_question_needs_all_of_its_parents() -> None:
    questions = [Question(1, "a"), Question(2, "b"), Question(3, "c", (1, 2))]
    assert dpg.score(questions, [True, False, True]) == pytest.approx(1 / 3)
    assert dpg.score(questions, [True, True, True]) == 1


@pytest.mark.parametrize(
    ("answer", "yes"), [("yes", True), (" Yes. ", True), ("no", False), ("yes, two", False), ("", False)]
)
def test_only_yes_is_yes(answer: str, yes: bool) -> None:
    assert dpg.is_yes(answer) is yes


def test_category_averages_count_answers_as_they_were_given() -> None:
    questions = dpg.read_questions(FACTS)
    judged = [(questions, (False, True, True, False)), (questions, (True, False, True, False))]
    assert dpg.category_scores(judged) == {"attribute": 75, "entity": 50, "global": 0}
    assert dpg.category_scores(judged, broad=False) == {
        "attribute - color": 50,
        "attribute - texture": 100,
        "entity - whole": 50,
        "global": 0,
    }


def test_the_benchs_score_weighs_prompts_alike() -> None:
    assert dpg.bench_score({"a": [1.0, 1.0, 1.0, 0.0], "b": [0.25]}) == pytest.approx(50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depends_on": [9]}, "'Is there a cat\\?' cannot be scored \\(question 9 is missing\\)"),
        ({"id": 4}, "question 1 is missing"),
        ({"id": "x"}, "cannot be read"),
        ({"depends_on": None}, "cannot be read"),
    ],
)
def test_questions_of_another_form_are_named(change: dict[str, Any], message: str) -> None:
    first, *rest = FACTS["questions"]
    with pytest.raises(UserError, match=message):
        dpg.read_questions({"questions": [{**first, **change}, *rest]})


def test_a_prompt_without_questions_is_refused() -> None:
    with pytest.raises(UserError, match="DPG-Bench's questions cannot be read"):
        dpg.read_questions({})
    with pytest.raises(UserError, match="there are none"):
        dpg.read_questions({"questions": []})
    twice = [FACTS["questions"][0], FACTS["questions"][0]]
    with pytest.raises(UserError, match="an id comes twice"):
        dpg.read_questions({"questions": twice})


# --- the real loaders -----------------------------------------------------------------------------

LABELS = {0: "cat", 1: "remote", 2: "sofa"}


def write_mask2former(folder: Path) -> Path:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        dim_feedforward=16,
        num_attention_heads=2,
        num_queries=6,
        id2label=LABELS,
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    processor = {"image_processor_type": "Mask2FormerImageProcessor", "size": {"height": 64, "width": 64}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def write_yolos(folder: Path) -> Path:
    from transformers import YolosConfig, YolosForObjectDetection

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=5,
        id2label=LABELS,
    )
    YolosForObjectDetection(config).save_pretrained(folder)
    processor = {"image_processor_type": "YolosImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_a_segmenter_finds_objects_with_masks(tmp_path: Path) -> None:
    detector = load_detector(write_mask2former(tmp_path / "tiny-mask2former"))
    assert detector.name == "tiny-mask2former"
    assert detector.labels == {"cat", "tv remote", "couch"}  # in GenEval's spelling
    picture = (torch.arange(50 * 70 * 3) % 256).view(50, 70, 3).to(torch.uint8)
    found = detector.detect(picture, 0.0)
    assert found
    for detection in found:
        assert detection.label in detector.labels
        assert 0 < detection.score <= 1
        assert detection.mask is not None
        assert detection.mask.shape == (50, 70)
        assert detection.box == box_of(detection.mask)
    assert detector.detect(picture, 0.99) == []
    assert found[0].score == detector.detect(picture, 0.0)[0].score


def test_a_detector_without_masks_finds_boxes(tmp_path: Path) -> None:
    detector = load_detector(write_yolos(tmp_path / "tiny-yolos"))
    picture = (torch.arange(50 * 70 * 3) % 256).view(50, 70, 3).to(torch.uint8)
    found = detector.detect(picture, 0.0)
    assert len(found) == 5
    for detection in found:
        assert detection.mask is None
        left, top, right, bottom = detection.box
        assert left < right <= 2 * 70
        assert top < bottom <= 2 * 50
    # the protocol runs on a real detector as on a fake one
    verdict = geneval.judge(picture, {"tag": "single_object", "include": [A_CAT]}, detector, FakeColours())
    assert isinstance(verdict.correct, bool)


def test_a_box_holds_its_mask_exactly() -> None:
    mask = torch.zeros(10, 12, dtype=torch.bool)
    mask[2:5, 3:9] = True
    assert box_of(mask) == (3, 2, 9, 5)


def write_words(folder: Path) -> int:
    """A BERT tokenizer of a few words, as BLIP and ViLT have; its size."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "it", "a", "cat", "?", "yes", "no"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return len(words)


def write_blip(folder: Path) -> Path:
    from transformers import BlipConfig, BlipForQuestionAnswering

    size = write_words(folder)
    torch.manual_seed(0)
    common: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    common |= {"num_attention_heads": 2, "projection_dim": 16}
    special = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = {"vocab_size": size, "encoder_hidden_size": 16, "max_position_embeddings": 20}
    config = BlipConfig(
        text_config=common | text | special,
        vision_config=common | {"image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    BlipForQuestionAnswering(config).save_pretrained(folder)
    processor = {"image_processor_type": "BlipImageProcessor", "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def write_vilt(folder: Path) -> Path:
    from transformers import ViltConfig, ViltForQuestionAnswering

    size = write_words(folder)
    torch.manual_seed(0)
    config = ViltConfig(
        vocab_size=size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        image_size=32,
        patch_size=8,
        id2label={0: "yes", 1: "no", 2: "two"},
    )
    ViltForQuestionAnswering(config).save_pretrained(folder)
    processor = {"image_processor_type": "ViltImageProcessor", "size": {"shortest_edge": 32}, "size_divisor": 8}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize("write", [write_blip, write_vilt])
def test_an_answerer_answers_each_question_by_itself(write: Any, tmp_path: Path) -> None:
    answerer = load_answerer(write(tmp_path / "tiny-answerer"))
    assert answerer.name == "tiny-answerer"
    picture = (torch.arange(40 * 48 * 3) % 256).view(40, 48, 3).to(torch.uint8)
    questions = ["is it a cat ?", "cat ?", "it it it it it it it it it it it it it it it it it it it it it it"]
    answers = answerer.answer(picture, questions * 6)  # more than go at once
    assert len(answers) == 18
    assert answers == [*answers[:3]] * 6
    alone = [answerer.answer(picture, [question])[0] for question in questions]
    assert answers[:3] == alone
    if write is write_vilt:
        assert set(answers) <= {"yes", "no", "two"}
    else:
        assert not any("[" in answer for answer in answers)  # no special tokens


@pytest.mark.parametrize("load", [load_detector, load_answerer])
def test_absent_judges_are_asked_for_by_name(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"is not here: .*run: hf download someone/model") as caught:
        load("someone/model")
    assert "\n" not in str(caught.value)


def test_models_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"is no detector \(bert\)"):
        load_detector(tmp_path)
    with pytest.raises(UserError, match="is a bert, not one of blip, vilt"):
        load_answerer(tmp_path)
