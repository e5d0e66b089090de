"""The part of a report about memorisation: the training pictures nearest to generated and to held-out ones"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from hartist.evaluation.report import plots
from hartist.evaluation.report.content import Card, Gallery, Part, Plots, Section, Shown, Table, Text
from hartist.evaluation.report.memorisation import (
    Closeness,
    Nearest,
    closeness,
    feature_figure,
    nearest,
    training_features,
    training_pictures,
)
from hartist.evaluation.report.options import Options
from hartist.evaluation.report.runs import Run
from hartist.evaluation.report.samples import Assets, draw
from hartist.evaluation.report.wording import number

SHOWN = 6
NEIGHBOURS = 3


@dataclass(frozen=True)
class Memorised:
    """How near the pictures of each run, and the real ones, come to the training pictures."""

    network: str
    training: Sequence[Path]
    generated: Sequence[Nearest]
    """Of each run."""
    held_out: Nearest


def prepare(runs: Sequence[Run], options: Options) -> Memorised | None:
    """Compute what the section needs; None without training pictures. Raises UserError as its parts do."""
    if options.training is None:
        return None
    paths = training_pictures(options.training)
    figures = [feature_figure(run.result, options.network) for run in runs]
    rows = [run.rows.of(figure) for run, figure in zip(runs, figures, strict=True)]
    with Image.open(runs[0].pictures[0].path) as first:
        size = first.height, first.width
    training_MD = training_features(
        paths, size, str(figures[0].network), options.cache, progress=options.resampling.progress
    )
    generated = [nearest(each.generated_ND, training_MD, NEIGHBOURS) for each in rows if each.generated_ND is not None]
    assert rows[0].reference_MD is not None
    return Memorised(str(figures[0].network), paths, generated, nearest(rows[0].reference_MD, training_MD, NEIGHBOURS))


def section(
    runs: Sequence[Run], names: Sequence[str], best: int, memorised: Memorised, options: Options, assets: Assets
) -> Section:
    """A histogram, a table, and pairs to look at: at random, and the nearest of all, of the run `best`."""
    found = [closeness(each, memorised.held_out) for each in memorised.generated]
    labels = [f"generated, {name}" if name else "generated" for name in names]
    sets = dict(zip([*labels, "held-out real"], [*memorised.generated, memorised.held_out], strict=True))
    svg = plots.histogram(
        {label: each.nearest_N.tolist() for label, each in sets.items()}, "cosine to the nearest training picture"
    )
    what = "Cosine to the nearest training picture"
    rows = []
    for label, each in sets.items():
        quantiles = torch.quantile(each.nearest_N.double(), torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
        above = (each.nearest_N.double() > found[0].threshold).double().mean().item()
        rows.append([label, *map(number, quantiles), number(each.nearest_N.max().item()), f"{above:.1%}"])
    own, run = memorised.generated[best], runs[best]
    order = own.nearest_N.argsort(descending=True, stable=True)[:SHOWN].tolist()
    of = f" of the run with {names[best]}" if names[best] else ""

    def cards(places: Sequence[int]) -> Gallery:
        return Gallery([_card(run, memorised, own, i, assets) for i in places])

    parts: list[Part] = [
        Text(_verdict(memorised, found, labels)),
        Plots([Shown(assets.plot("nearest", svg), what, f"{what}, features of {memorised.network}")]),
        Table(["pictures", "median", "95 % below", "nearest", "beyond 99 % of held-out"], rows),
        Text(f"Pictures at random{of}, each followed by the training pictures nearest to it, with their cosines:"),
        cards(draw(len(run.pictures), SHOWN, options.resampling.seed)),
        Text(f"The pictures{of} that are nearest to training pictures:"),
        cards(order),
    ]
    return Section("Nearest training pictures", parts)


def _verdict(memorised: Memorised, found: Sequence[Closeness], labels: Sequence[str]) -> str:
    shares = "; ".join(
        f"{each.share_above:.1%} of the {label} pictures" for each, label in zip(found, labels, strict=True)
    )
    text = (
        f"{shares} are nearer to one of {len(memorised.training)} training pictures than 99 % of "
        f"{len(memorised.held_out.nearest_N)} held-out real pictures are. A model that does not copy stays near 1 %."
    )
    same = found[0].held_out_in_training
    if same:
        text += (
            f" But {same} of the real pictures are in the training folder themselves: give a folder without them, "
            "or the comparison says little."
        )
    return text


def _card(run: Run, memorised: Memorised, found: Nearest, i: int, assets: Assets) -> Card:
    picture = run.pictures[i]
    shown = [Shown(assets.picture(picture.path), picture.prompt, "generated")]
    for similarity, place in zip(found.similarity_NK[i].tolist(), found.place_NK[i].tolist(), strict=True):
        path = memorised.training[place]
        shown.append(Shown(assets.picture(path), f"training picture {path.name}", number(similarity)))
    return Card(shown, picture.prompt)
