"""Drawn pictures with captions, and an exact reader of them (not in the paper).

A picture of 16x16 pixels has four cells, each empty or with one object: one of four forms in one
of four colours. A caption says colour, form, number and place, and leaves the rest open."""

import hashlib
import itertools
import random
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from uvit_repro.config import CONTENT, DataConfig, ParameterError, key_seed
from uvit_repro.data.images import Data, check_size

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 214),
    "yellow": (240, 190, 20),
}
FORMS = ("circle", "square", "triangle", "cross")
HALVES = {"top": (0, 1), "bottom": (2, 3), "left": (0, 2), "right": (1, 3)}  # cells 0 1 above 2 3
OPPOSITE = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}
RELATIONS = {"top": "above", "bottom": "below", "left": "left of", "right": "right of"}
KINDS = tuple(itertools.product(COLOURS, FORMS))
UNSEEN = tuple(zip(COLOURS, reversed(FORMS), strict=True))  # never in a training picture
BACKGROUND, CELL, SIZE = (240, 240, 240), 8, 7  # pixels along a cell, an object
SHIFTS = tuple(itertools.product(range(2), range(2)))  # of all objects of a picture
ATTRIBUTES = ("colour", "shape", "position", "count", "exact")
TEXT_TOKENS, WORD_BITS, FADE = 8, 32, 0.7
N_SHAPES, HOLD_SHAPES = 16_896, 32  # pictures in all; one in so many is held out


class Group(NamedTuple):
    "One or two equal objects."

    count: int
    colour: str
    form: str


class Scene(NamedTuple):
    "What a caption says: the half of the first group, and one or two groups in opposite halves."

    half: str
    groups: tuple

    def parts(self) -> list:
        "(group, its half)."
        return list(zip(self.groups, (self.half, OPPOSITE[self.half]), strict=False))

    def objects(self) -> list:
        "(colour, form, cells it may be in) of each object."
        return [(g.colour, g.form, HALVES[h]) for g, h in self.parts() for _ in range(g.count)]

    @property
    def unseen(self) -> bool:
        return any((g.colour, g.form) in UNSEEN for g in self.groups)


def draw_scene(
    rng: random.Random,  # source of chance
    unseen=False,  # groups of combinations that training never shows, instead of the others
) -> Scene:
    "A random scene: two groups in three of five, two objects in a group in one of three."

    def pick(options):
        return options[int(rng.random() * len(options))]

    kinds = [k for k in KINDS if (k in UNSEEN) == unseen]
    first = pick(kinds)
    second = pick([k for k in kinds if k != first])
    half = pick(list(HALVES))
    groups = [Group(1 + (rng.random() < 1 / 3), *first)]
    if rng.random() < 0.6:
        groups.append(Group(1 + (rng.random() < 1 / 3), *second))
    return Scene(half, tuple(groups))


def _noun(g: Group) -> str:
    plural = "" if g.count == 1 else "es" if g.form == "cross" else "s"
    return f"{'a' if g.count == 1 else 'two'} {g.colour} {g.form}{plural}"


def caption(
    scene: Scene,
    wording=0,  # 0 or 1: the converse relation, or the place in front
) -> str:
    "A scene in words."
    nouns = [_noun(g) for g in scene.groups]
    if len(nouns) == 1:
        place = f"{'at' if scene.half in ('top', 'bottom') else 'on'} the {scene.half}"
        return f"{place} {nouns[0]}" if wording else f"{nouns[0]} {place}"
    half = OPPOSITE[scene.half] if wording else scene.half
    a, b = reversed(nouns) if wording else nouns
    return f"{a} {RELATIONS[half]} {b}"


def form_mask(form: str) -> np.ndarray:  # bool (7, 7)
    "The pixels of a form."
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    return {
        "square": abs(x) <= SIZE,
        "circle": x**2 + y**2 <= 12,
        "triangle": 2 * abs(x) <= y + 4,
        "cross": (abs(x - y) <= 1) | (abs(x + y) <= 1),
    }[form]


def object_cell(kind: int, dy: int, dx: int) -> np.ndarray:  # uint8 (8, 8, 3)
    "One cell with an object of a kind, or -1 for none, at a shift."
    cell = np.full((CELL, CELL, 3), BACKGROUND, np.uint8)
    if kind >= 0:
        colour, form = KINDS[kind]
        cell[dy : dy + SIZE, dx : dx + SIZE][form_mask(form)] = COLOURS[colour]
    return cell


@cache
def _templates() -> tuple[Tensor, Tensor, Tensor]:
    "All that a cell can show: kinds, pixels, half the distance to the nearest of another kind."
    shown = [(-1, 0, 0)] + [(k, y, x) for k in range(len(KINDS)) for y, x in SHIFTS]
    cells = torch.tensor(np.stack([object_cell(*s) for s in shown]), dtype=torch.float32)
    kinds, flat = torch.tensor([k for k, *_ in shown]), cells.flatten(1)
    apart = torch.cdist(flat, flat).masked_fill(kinds[:, None] == kinds, torch.inf)
    return kinds, flat, apart.amin(1) / 2


def draw_picture(
    scene: Scene,
    rng: random.Random,  # decides what the caption leaves open
) -> np.ndarray:  # uint8 (16, 16, 3)
    "A picture of a scene; one shift for all objects, so that they never touch."
    cells, shift = [object_cell(-1, 0, 0)] * 4, SHIFTS[int(rng.random() * len(SHIFTS))]
    for g, half in scene.parts():
        places = HALVES[half] if g.count == 2 else (HALVES[half][int(rng.random() * 2)],)
        for c in places:
            cells[c] = object_cell(KINDS.index((g.colour, g.form)), *shift)
    return np.concatenate([np.concatenate(cells[:2], 1), np.concatenate(cells[2:], 1)])


def draw_pictures(scenes: list, seed) -> Tensor:  # uint8 (n, 3, 16, 16)
    "Pictures of scenes, one after the other."
    rng = random.Random(key_seed("shapes pictures", seed))
    pictures = np.stack([draw_picture(s, rng) for s in scenes])
    return torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy())


def read_pictures(
    images: Tensor,  # uint8 (n, 3, 16, 16)
) -> tuple:  # (n, 4) each: kinds (-1: empty), certain, root mean square distance
    "What each cell shows: the nearest of everything it could show."
    if images.shape[1:] != (3, 2 * CELL, 2 * CELL):
        raise ParameterError(f"images {tuple(images.shape)}: the reader takes (n, 3, 16, 16)")
    kinds, templates, margin = _templates()
    cells = images.cpu().float().permute(0, 2, 3, 1).reshape(-1, 2, CELL, 2, CELL, 3)
    cells = cells.transpose(2, 3).reshape(-1, 4, CELL * CELL * 3)
    distance, nearest = torch.cdist(cells, templates).min(-1)
    return kinds[nearest], distance < margin[nearest], distance / cells.shape[-1] ** 0.5


def judge_picture(
    kinds: list,  # the four cells as read
    scene: Scene,  # as asked for
) -> dict:  # attribute -> (right, total)
    "How much of a scene a picture shows, objects matched so that as much as possible agrees."
    want = scene.objects()
    have = [(*KINDS[k], c) for c, k in enumerate(kinds) if k >= 0]
    padded = have + [("", "", -1)] * (len(want) - len(have))

    def agreement(chosen):
        pairs = list(zip(want, chosen, strict=True))
        same = [sum(w[i] == h[i] for w, h in pairs) for i in (0, 1)]
        return [*same, sum(h[2] in w[2] for w, h in pairs)]

    right = max(map(agreement, itertools.permutations(padded, len(want))), key=sum)
    counted = len(have) == len(want)
    exact = counted and sum(right) == 3 * len(want)
    scores = [(r, len(want)) for r in right] + [(int(counted), 1), (int(exact), 1)]
    return dict(zip(ATTRIBUTES, scores, strict=True))


def judge_pictures(
    images: Tensor,  # uint8 (n, 3, 16, 16)
    scenes: list,  # n of Scene
) -> dict:  # prompt_ATTRIBUTE_seen and _unseen -> int64 [right, total]
    "Prompt accuracy as statistics, scenes of unseen combinations apart."
    names = [f"prompt_{a}_{w}" for a in ATTRIBUTES for w in ("seen", "unseen")]
    out = {n: np.zeros(2, np.int64) for n in names}
    for kinds, s in zip(read_pictures(images)[0].tolist(), scenes, strict=True):
        for a, score in judge_picture(kinds, s).items():
            out[f"prompt_{a}_{'unseen' if s.unseen else 'seen'}"] += np.array(score)
    return out


def word_code(word: str) -> Tensor:  # (32,) of -1 and 1
    "The fixed code of a word: the first bits of its sha256."
    raw = np.frombuffer(hashlib.sha256(word.encode()).digest(), np.uint8)
    return torch.from_numpy(2 * np.unpackbits(raw)[:WORD_BITS].astype(np.float32) - 1)


@cache
def vocabulary() -> dict:
    "The code of every word of a caption."
    nouns = [_noun(Group(n, *kind)) for n in (1, 2) for kind in KINDS]
    words = " ".join([*nouns, "at on the", *HALVES, *RELATIONS.values()]).split()
    return {w: word_code(w) for w in sorted(set(words))}


def encode_words(
    text: str,  # a caption, or the empty text
) -> Tensor:  # float32 (8, 96): word, words before, words behind; zeros after the last word
    "The frozen text encoder of `shapes`. Raises `ParameterError` for unknown or too many words."
    words, codes = text.lower().split(), vocabulary()
    unknown = [w for w in words if w not in codes]
    if unknown:
        raise ParameterError(f"{text!r}: unknown {', '.join(unknown)}; known {', '.join(codes)}")
    if len(words) > TEXT_TOKENS:
        raise ParameterError(f"{text!r}: {len(words)} words, at most {TEXT_TOKENS}")
    out = torch.zeros(TEXT_TOKENS, 3 * WORD_BITS)
    if words:
        v, i = torch.stack([codes[w] for w in words]), torch.arange(len(words))
        back = (i[:, None] - i).float()
        before, behind = (torch.where(d > 0, FADE ** (d - 1), 0.0) for d in (back, -back))
        out[: len(words)] = torch.cat([v, before @ v, behind @ v], 1)
    return out


def prompt_scene(i: int) -> Scene:
    "The scene of evaluation prompt i: seen combinations for even i, unseen ones for odd i."
    return draw_scene(random.Random(key_seed("shapes prompt", i)), unseen=i % 2 == 1)


class ShapeTexts:
    "Captions of `shapes`: two wordings of each picture; every different caption is encoded once."

    null = torch.zeros(TEXT_TOKENS, 3 * WORD_BITS)

    def __init__(self, train: list, test: list):
        words = [[caption(s, w) for w in (0, 1)] for s in train + test]
        number = {t: i for i, t in enumerate(sorted({t for pair in words for t in pair}))}
        self.codes = torch.stack([encode_words(t) for t in number])
        ids = torch.tensor([[number[t] for t in pair] for pair in words])
        self.ids, self.test_ids = ids[: len(train)], ids[len(train) :]

    def read(self, index: Tensor, u: Tensor) -> Tensor:
        "One caption of each training image, chosen by a number in [0, 1)."
        return self.codes[self.ids[index, (u * 2).long()]]

    def test(self, index: Tensor) -> Tensor:
        "The captions of held-out images."
        return self.codes[self.test_ids[index, 0]]

    def prompt(self, i: int) -> str:
        "Evaluation prompt i in words."
        return caption(prompt_scene(i), i // 2 % 2)

    def prompts(self, n: int) -> Tensor:
        "The first n evaluation prompts, encoded."
        return torch.stack([encode_words(self.prompt(i)) for i in range(n)])


def load_shapes(
    cfg: DataConfig,  # img_size 16, in_chans 3
    root=None,  # not used: the pictures are drawn
) -> Data:  # pictures drawn from a fixed seed, one in 32 held out
    "Pictures of coloured forms with captions, and an exact judge of samples (not in the paper)."
    check_size("shapes", (2 * CELL, 2 * CELL, 3), cfg, own_test_split=True)
    rng = random.Random(key_seed("shapes scenes"))
    scenes = [draw_scene(rng) for _ in range(N_SHAPES)]
    x = draw_pictures(scenes, "set")
    first_byte = [hashlib.sha256(p.tobytes()).digest()[0] for p in x.numpy()]
    held = torch.tensor(first_byte) % HOLD_SHAPES == 0
    none = torch.zeros(len(x), dtype=torch.int64)
    train, test = ([s for s, h in zip(scenes, held, strict=True) if h == want] for want in (0, 1))
    texts, split = ShapeTexts(train, test), (x[~held], none[~held], x[held], none[held])
    return Data("shapes", *split, 0, [], CONTENT["shapes"], texts=texts, judge=judge_samples)


def judge_samples(images: Tensor, start=0) -> dict:
    "`judge_pictures` of samples in the order of the prompts."
    return judge_pictures(images, [prompt_scene(i) for i in range(start, start + len(images))])
