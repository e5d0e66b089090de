"""Detectors of the transformers library: Mask2Former and MaskFormer with masks, DETR and its kin with boxes alone

The nearest to GenEval's judge is `facebook/mask2former-swin-small-coco-instance`: the same architecture, by its
authors' weights instead of mmdetection's. Its figures may differ from published ones by some points.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from hartist.errors import UserError
from hartist.evaluation.hub import load_image_processor, load_part, load_pretrained
from hartist.evaluation.judges.base import Detection

DEFAULT = "facebook/mask2former-swin-small-coco-instance"
SEGMENTERS = ("mask2former", "maskformer")
SPELLING = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "hair dryer": "hair drier",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}
"""COCO's names as models have them → as GenEval's prompts have them."""


@dataclass(frozen=True)
class TransformersDetector:
    """A detector or instance segmenter with its image processor."""

    name: str
    network: Any
    processor: Any
    has_masks: bool

    @property
    def names(self) -> dict[int, str]:
        """Labels by their number."""
        return {int(i): SPELLING.get(name, name) for i, name in self.network.config.id2label.items()}

    @property
    def labels(self) -> frozenset[str]:
        return frozenset(self.names.values())

    @torch.inference_mode()
    def detect(self, picture_HW3: UInt8[Tensor, "h w 3"], threshold: float) -> list[Detection]:
        h, w = picture_HW3.shape[:2]
        prepared = self.processor(
            images=[picture_HW3.cpu().numpy()], return_tensors="pt", input_data_format="channels_last"
        ).to(self.network.device)
        outputs = self.network(**{key: value for key, value in prepared.items() if key.startswith("pixel_")})
        names = self.names
        if not self.has_masks:
            (found,) = self.processor.post_process_object_detection(outputs, threshold, target_sizes=[(h, w)])
            rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
            return [Detection(names[label], score, tuple(box)) for label, score, box in rows]
        (found,) = self.processor.post_process_instance_segmentation(
            outputs, threshold, target_sizes=[(h, w)], return_binary_maps=True
        )
        if not found["segments_info"]:
            return []
        masks = found["segmentation"].bool().cpu()
        return [
            Detection(names[segment["label_id"]], segment["score"], box_of(mask_HW), mask_HW)
            for segment, mask_HW in zip(found["segments_info"], masks, strict=True)
        ]


def box_of(mask_HW: Tensor) -> tuple[float, float, float, float]:
    """The smallest box around a mask that has pixels."""
    rows, columns = (mask_HW.any(dim).nonzero()[:, 0] for dim in (1, 0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def load_detector(source: str | Path = DEFAULT, device: torch.device | str = "cpu") -> TransformersDetector:
    """A detector from a folder or a repository's name.

    Raises UserError with the command that gets it if it is absent, and for networks that detect nothing.
    """
    import transformers

    what = f"the detector {source}"
    config = load_part(transformers.AutoConfig, source, what)
    has_masks = config.model_type in SEGMENTERS
    if not has_masks and type(config) not in transformers.AutoModelForObjectDetection._model_mapping:
        raise UserError(f"{what} is no detector ({config.model_type}); give DETR or Mask2Former, such as {DEFAULT}")
    kind = transformers.AutoModelForInstanceSegmentation if has_masks else transformers.AutoModelForObjectDetection
    if config.model_type == "mask2former":
        kind = transformers.Mask2FormerForUniversalSegmentation
    network = load_pretrained(kind, source, what).to(device)
    return TransformersDetector(Path(source).name, network, load_image_processor(source, what), has_masks)
