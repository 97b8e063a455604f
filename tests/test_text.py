"""Text: CLIP, MS-COCO, the store of captions, the drawn shapes and their reader."""

import hashlib
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from uvit_repro.config import CONTENT, DataConfig, ParameterError, key_seed
from uvit_repro.data import shapes as S
from uvit_repro.data.autoencoder import load_autoencoder
from uvit_repro.data.clip import CLIP_MODEL, ClipText, load_clip
from uvit_repro.data.coco import (
    CAPTIONS,
    LATENTS,
    Coco,
    Texts,
    TextStore,
    coco_crop,
    encode_texts,
    evaluation_prompts,
    load_mscoco256,
    read_captions,
)
from uvit_repro.data.encode import encode_images, file_source
from uvit_repro.data.files import sha256_file
from uvit_repro.data.images import ordered_sum
from uvit_repro.data.store import Encoding, StoreError
from uvit_repro.text import prompt_accuracy

SMALL = {
    "embed_dim": 32,
    "quick_gelu": True,
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
START, END = 49406, 49407


# ---------------------------------------------------------------- CLIP
def small_model(folder, quick_gelu=True):
    "A small CLIP model of open_clip with random weights."
    import open_clip

    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    name = f"tiny-text-{quick_gelu}"
    config = json.dumps({**SMALL, "quick_gelu": quick_gelu, "vision_cfg": vision})
    (folder / f"{name}.json").write_text(config, encoding="utf-8")
    open_clip.add_model_config(folder / f"{name}.json")
    model, g = open_clip.create_model(name), torch.Generator().manual_seed(0)
    for k, p in model.named_parameters():
        mean = float(k.endswith(("ln_1.weight", "ln_2.weight", "ln_final.weight")))
        p.data = mean + 0.3 * torch.randn(p.shape, generator=g)
    return model


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    "A small text encoder with random weights, large enough for every part to matter."
    return ClipText(small_model(tmp_path_factory.mktemp("clip")), "made")


def one_token_at_a_time(s, ids, heads=2):
    "CLIP's text model for one caption: each token attends to itself and to those before it."
    s = {k: v.double() for k, v in s.items()}

    def linear(n, x, weight="weight", bias="bias"):
        return s[f"{n}{weight}"] @ x + s[f"{n}{bias}"]

    def norm(n, x):
        x = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5)
        return x * s[f"{n}.weight"] + s[f"{n}.bias"]

    positions = s["positional_embedding"]
    x = [s["token_embedding.weight"][t] + positions[i] for i, t in enumerate(ids.tolist())]
    for i in range(2):
        block = f"transformer.resblocks.{i}"
        qkv = [
            linear(f"{block}.attn.", norm(f"{block}.ln_1", v), "in_proj_weight", "in_proj_bias")
            for v in x
        ]
        q, k, v = torch.stack(qkv).view(len(x), 3, heads, -1).unbind(1)
        for n in range(len(x)):
            a = (torch.einsum("hd,mhd->hm", q[n], k[: n + 1]) / q.shape[-1] ** 0.5).softmax(-1)
            mixed = torch.einsum("hm,mhd->hd", a, v[: n + 1]).flatten()
            y = x[n] + linear(f"{block}.attn.out_proj.", mixed)
            z = linear(f"{block}.mlp.c_fc.", norm(f"{block}.ln_2", y))
            x[n] = y + linear(f"{block}.mlp.c_proj.", z / (1 + torch.exp(-1.702 * z)))
    return torch.stack([norm("ln_final", v) for v in x])


def test_tokens_equal_the_definition(clip, tmp_path):
    import open_clip

    text = "Two women waiting at a bench."
    want = one_token_at_a_time(clip.model.state_dict(), clip.tokens([text])[0])
    assert torch.allclose(clip.encode([text])[0].double(), want, atol=1e-4)
    plain = ClipText(small_model(tmp_path, quick_gelu=False))
    assert plain.sha256 == clip.sha256 and (plain.encode([text])[0] - want).abs().max() > 0.01
    assert open_clip.get_model_config(CLIP_MODEL)["text_cfg"]["width"] == 768


def test_padding_truncation_null(clip):
    ids = clip.tokens(["", "word " * 200, "hello ! !"])
    assert ids[0].tolist() == [START] + [END] * 76
    assert ids[1, -1] == END and (ids[1] == END).sum() == 1
    assert ids[2, 2] == ids[2, 3] and ids[2, 4:].eq(END).all()
    assert torch.allclose(clip.encode([""])[0], clip.encode(["", "x"])[0], atol=1e-5)


def test_weights_absent_or_foreign(tmp_path, clip):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="hf_hub_download"):
        load_clip(tmp_path)
    with pytest.raises(FileNotFoundError, match="mine.safetensors"):
        load_clip(tmp_path, str(tmp_path / "mine.safetensors"))
    (tmp_path / "clip").mkdir()
    file = tmp_path / "clip" / "open_clip_model.safetensors"
    save_file(small_model(tmp_path).state_dict(), file)
    assert load_clip(tmp_path, name="tiny-text-True").sha256 == clip.sha256
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ParameterError, match="safetensors is not tiny-text-True"):
        load_clip(tmp_path, name="tiny-text-True")


# ---------------------------------------------------------------- MS-COCO
def annotations(root, split, ids, n=5):
    path = root / "coco" / "annotations" / f"captions_{split}2014.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": i, "file_name": f"COCO_{split}2014_{i:012d}.jpg"} for i in ids]
    said = [
        {"id": 10 * i + k, "image_id": i, "caption": f"{split} {i} caption {k}"}
        for i in ids
        for k in range(n + i % 2)
    ]
    text = json.dumps({"images": images, "annotations": said})
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def root(tmp_path, monkeypatch):
    "A root with a small MS-COCO and a small autoencoder."
    from diffusers import AutoencoderKL

    monkeypatch.setenv("UVIT_REPRO_ROOT", str(tmp_path))
    rng = np.random.default_rng(0)
    for split, ids in (("train", (3, 1, 2, 4)), ("val", (9, 8, 7))):
        annotations(tmp_path, split, ids)
        folder = tmp_path / "coco" / f"{split}2014"
        folder.mkdir()
        for i in ids:
            x = rng.integers(0, 256, (24, 30 + i, 3), np.uint8)
            Image.fromarray(x).save(folder / f"COCO_{split}2014_{i:012d}.jpg")
    two = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
    two["down_block_types"] = ("DownEncoderBlock2D",) * 2
    two["up_block_types"] = ("UpDecoderBlock2D",) * 2
    AutoencoderKL(**two).save_pretrained(tmp_path / "autoencoders" / "tiny")
    return tmp_path


def test_captions_of_coco(tmp_path):
    path = annotations(tmp_path, "train", (5, 2, 9))
    c = read_captions(tmp_path, "train")
    assert [x.id for x in c] == [2, 5, 9] and [len(x.captions) for x in c] == [5, 6, 6]
    assert c[1].captions[4] == "train 5 caption 4"
    bare = {"images": [{"id": 1, "file_name": "x"}], "annotations": []}
    for text, word in ((json.dumps(bare), "without caption"), ("[]", "is not a caption file")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=word):
            read_captions(tmp_path, "train")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"(?s)captions_train2014\.json is not there.*curl"):
        read_captions(tmp_path, "train")


def test_prompts_are_fixed(tmp_path):
    annotations(tmp_path, "val", (5, 2, 9))
    c = read_captions(tmp_path, "val")
    prompts = evaluation_prompts(c, 9000)
    assert prompts[:5] == evaluation_prompts(c, 5) and {i for i, _ in prompts[:3]} == {0, 1, 2}
    share = np.bincount([k for i, k in prompts if i == 1], minlength=6) / 3000
    assert abs(share - 1 / 6).max() < 0.03  # every caption equally often


def test_mscoco_from_files_to_data(root, clip):
    ae = load_autoencoder("tiny", root)
    coco = Coco(root, held_out=2, prompts=5)
    sizes = {"img_size": 8, "in_chans": 4, "text_tokens": 77, "text_dim": 32}
    cfg = DataConfig(dataset="mscoco256", latent_scale=0.2301, **sizes)
    latents, captions = root / LATENTS, root / CAPTIONS
    with pytest.raises(FileNotFoundError, match="uvit-repro encode captions"):
        load_mscoco256(cfg, root)
    encode_texts(captions, coco.texts(), clip, Encoding(batch=2, shard_rows=4))
    with pytest.raises(FileNotFoundError, match="mscoco256_latents is not there"):
        load_mscoco256(cfg, root)
    source = file_source(coco.listing(16), coco.name, coco.held_out, "again")
    encode_images(source, ae, latents, Encoding(batch=2, shard_rows=4, mirror=False))
    d = load_mscoco256(cfg, root)
    assert (len(d), len(d.test_labels), d.shape, d.num_classes) == (4, 2, (3, 16, 16), 0)
    rows = d.texts.numbers(torch.tensor([0, 0, 3, 3]), torch.tensor([0.0, 0.9999999, 0.2, 0.99]))
    said = ["train 1 caption 0", "train 1 caption 5", "train 4 caption 1", "train 4 caption 4"]
    assert [d.texts.captions[r] for r in rows] == said
    i, k = coco.prompts[1]
    want = f"val {coco.val[i].id} caption {k}"
    assert d.texts.prompt(1) == want
    for x in (d.texts.prompts(5)[1:2], d.texts.test(torch.tensor([1]))):
        assert torch.allclose(x, clip.encode([want]), atol=1e-5)
    with Image.open(root / "coco" / "val2014" / coco.val[i].file) as im:
        u8 = torch.from_numpy(coco_crop(im.convert("RGB"), 16).copy()).permute(2, 0, 1)[None]
    assert torch.allclose(d.test_inputs[1:2], 0.2301 * ae.encode(u8)[:, :4], atol=1e-4)
    with pytest.raises(ParameterError, match="5 prompts"):
        d.texts.prompts(6)
    other = Coco(root, held_out=1, prompts=2)
    for p in captions.iterdir():
        p.unlink()
    encode_texts(captions, other.texts(), clip, Encoding(batch=2, shard_rows=4))
    with pytest.raises(StoreError, match="different captions"):
        load_mscoco256(cfg, root)


def test_an_image_of_coco_that_cannot_be_read_is_named(root):
    coco = Coco(root, held_out=2, prompts=5)
    listing = coco.listing(16)
    listing.files[2][1].write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"(?s){listing.files[2][1].name} can't be read.*again"):
        file_source(listing, coco.name, coco.held_out, "again").read(0, 4)


# ---------------------------------------------------------------- the store of captions
class Killed(BaseException):
    pass


class Fragile:
    "An encoder that dies after some calls."

    def __init__(self, clip, calls):
        self.clip, self.left, self.length, self.width = clip, calls, clip.length, clip.width
        self.sha256, self.name = clip.sha256, clip.name

    def encode(self, texts):
        if self.left <= 0:
            raise Killed
        self.left -= 1
        return self.clip.encode(texts)


def contents(path):
    files = [f for f in path.iterdir() if f.name != ".lock" and "damaged" not in f.name]
    return {f.name: sha256_file(f) for f in files}


def some_texts(n):
    return Texts([[f"caption {i}" for i in range(n - 4)]], [f"prompt {i}" for i in range(4)])


@pytest.mark.parametrize("seed", range(2))
def test_killed_ten_times_gives_the_same_bytes(tmp_path, clip, seed):
    rng, how = random.Random(seed), Encoding(batch=2, shard_rows=4)
    encode_texts(tmp_path / "a", some_texts(40), clip, how)
    for _ in range(10):
        with pytest.raises(Killed):
            fragile = Fragile(clip, rng.choice((0, 1, 1, 2)))
            encode_texts(tmp_path / "b", some_texts(40), fragile, how)
    encode_texts(tmp_path / "b", some_texts(40), clip, how)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    encode_texts(tmp_path / "b", some_texts(40), Fragile(clip, 0), how)  # nothing is left


def test_a_flipped_bit_is_named_and_repaired(tmp_path, clip):
    how = Encoding(batch=2, shard_rows=4)
    store = encode_texts(tmp_path / "s", some_texts(9), clip, how)
    before, files = store.encoded(range(10)), contents(store.path)
    assert store.captions[:2] == ["", "caption 0"] and store.captions[9] == "prompt 3"
    for name in ("contexts-00001.npy", "shard-00001.json"):
        raw = bytearray((store.path / name).read_bytes())
        raw[len(raw) // 2] ^= 4
        (store.path / name).write_bytes(raw)
        with pytest.raises(StoreError, match=name):
            TextStore(store.path).verify()
        again = TextStore(store.path)
        with pytest.raises(StoreError, match=f"{name} is damaged"):
            print(again.captions if "shard" in name else again.encoded([5]))
        again = encode_texts(store.path, some_texts(9), Fragile(clip, 2), how)
        assert torch.equal(again.encoded(range(10)), before) and contents(store.path) == files
    with pytest.raises(ParameterError, match="something else"):
        encode_texts(store.path, some_texts(8), clip, how)
    with pytest.raises(IndexError, match="10"):
        store.encoded([10])
    half = encode_texts(tmp_path / "h", some_texts(9), clip, replace(how, dtype="float16"))
    assert torch.allclose(half.encoded([5]).float(), store.encoded([5]), atol=1e-2)


# ---------------------------------------------------------------- shapes
@pytest.fixture(scope="module")
def shapes():
    return S.load_shapes(DataConfig(dataset="shapes", img_size=16, in_chans=3))


def all_scenes():
    "The scene of every caption."
    groups = [S.Group(n, *kind) for n in (1, 2) for kind in S.KINDS]
    alone = [(g,) for g in groups]
    pairs = [(a, b) for a in groups for b in groups]
    scenes = [S.Scene(half, g) for half in S.HALVES for g in alone + pairs]
    in_front = {S.caption(s, 1): s for s in scenes if len(s.groups) == 1}
    return {**in_front, **{S.caption(s): s for s in scenes}}


SCENES = all_scenes()


def rates(statistics):
    return {k: right / total for k, (right, total) in statistics.items() if total}


def test_the_reader_is_exact(shapes):
    x = S.draw_pictures([S.prompt_scene(i) for i in range(300)], 1)
    statistics = shapes.judge(x)
    assert set(rates(statistics).values()) == {1.0} and len(statistics) == 10
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    noisy = (x + 60 * noise).clamp(0, 255).to(torch.uint8)
    assert min(rates(shapes.judge(noisy)).values()) == 1.0
    wrong = rates(shapes.judge(x, start=2))
    assert wrong["prompt_exact_seen"] < 0.05 and wrong["prompt_colour_seen"] < 0.45
    with pytest.raises(ParameterError, match="16, 16"):
        S.read_pictures(torch.zeros(1, 3, 8, 8))


def test_the_reader_sees_each_kind_of_mistake():
    scene = SCENES["two green circles left of a yellow cross"]
    x = S.draw_pictures([scene], 0)

    def right(images):
        kinds = S.read_pictures(images)[0][0].tolist()
        return tuple(r for r, _ in S.judge_picture(kinds, scene).values())

    assert right(x) == (3, 3, 3, 1, 1)
    assert right(x.flip(-1)) == (3, 3, 0, 1, 0)  # the right objects on the wrong side
    for kind, want in (
        (("blue", "circle"), (2, 3, 3, 1, 0)),
        (("green", "square"), (3, 2, 3, 1, 0)),
        (None, (2, 2, 2, 0, 0)),
    ):
        cell = S.object_cell(S.KINDS.index(kind) if kind else -1, 1, 0)
        y = x.clone()
        y[0, :, :8, :8] = torch.from_numpy(cell).permute(2, 0, 1)
        assert right(y) == want
    assert right(torch.full_like(x, 240)) == (0, 0, 0, 0, 0)


def test_unseen_combinations_are_kept_out(shapes):
    for x in (shapes.train_images, shapes.test_images):
        kinds, certain, _ = S.read_pictures(x)
        seen = {S.KINDS[k] for k in kinds.flatten().tolist() if k >= 0}
        assert certain.all() and seen == set(S.KINDS) - set(S.UNSEEN)
    train, test = (
        {p.tobytes() for p in x.numpy()} for x in (shapes.train_images, shapes.test_images)
    )
    assert not train & test
    assert [S.prompt_scene(i).unseen for i in range(6)] == [False, True] * 3


def test_captions_and_scenes_are_one_to_one():
    assert len(SCENES) == 4 * (32 + 32**2) + 4 * 32  # both wordings of one group, one of two
    for i in range(2000):
        s = S.draw_scene(random.Random(i), i % 3 == 0)
        assert SCENES[S.caption(s)] == s
        converse = SCENES[S.caption(s, 1)]
        assert sorted(converse.objects()) == sorted(s.objects())


def test_the_drawings_are_what_their_name_promises(shapes):
    "The checksum of captions, pictures, split and codes."
    rng = random.Random(key_seed("shapes scenes"))
    scenes = [S.draw_scene(rng) for _ in range(S.N_SHAPES)]
    x = S.draw_pictures(scenes, "set")
    held = [hashlib.sha256(p.tobytes()).digest()[0] % S.HOLD_SHAPES == 0 for p in x.numpy()]
    assert torch.equal(x[torch.tensor(held)], shapes.test_images)
    text = "\n".join(S.caption(s, w) for s in scenes for w in (0, 1))
    said = hashlib.sha256(text.encode()).hexdigest()
    pixels = ordered_sum((x.permute(0, 2, 3, 1).numpy(), np.array(held, int)))
    signs = [(w, c.int().tolist()) for w, c in S.vocabulary().items()]
    codes = repr((S.TEXT_TOKENS, S.FADE, signs))
    total = hashlib.sha256((said + pixels + codes).encode()).hexdigest()
    assert total == CONTENT["shapes"] == shapes.sha256


def test_codes_of_words(shapes):
    a, r, o = (S.word_code(w) for w in ("a", "red", "circle"))
    code = S.encode_words("a red circle")
    assert torch.allclose(code[0], torch.cat([a, 0 * a, r + 0.7 * o]))
    assert torch.allclose(code[2], torch.cat([o, r + 0.7 * a, 0 * a]))
    assert code[3:].abs().sum() == 0 and torch.equal(shapes.texts.null, S.encode_words(""))
    with pytest.raises(ParameterError, match="dog"):
        S.encode_words("a red dog")
    with pytest.raises(ParameterError, match="at most 8"):
        S.encode_words("a " * 9)


def test_texts_belong_to_their_pictures(shapes):
    words = {tuple(code.tolist()): w for w, code in S.vocabulary().items()}

    def spoken(code):
        known = [words.get(tuple(row[: S.WORD_BITS].tolist())) for row in code]
        return SCENES[" ".join(w for w in known if w)]

    index = torch.arange(200)
    wordings = [shapes.texts.read(index, torch.full((200,), u)) for u in (0.0, 0.999)]
    assert (wordings[0] != wordings[1]).flatten(1).any(1).all()
    kinds = S.read_pictures(shapes.train_images[index])[0].tolist()
    for codes in wordings:
        assert all(
            S.judge_picture(k, spoken(c))["exact"] == (1, 1)
            for k, c in zip(kinds, codes, strict=True)
        )
    held = S.read_pictures(shapes.test_images[:50])[0].tolist()
    codes = shapes.texts.test(torch.arange(50))
    assert all(
        S.judge_picture(k, spoken(c))["exact"] == (1, 1) for k, c in zip(held, codes, strict=True)
    )
    prompts = shapes.texts.prompts(50)
    assert (
        torch.equal(prompts[10:12][1], S.encode_words(shapes.texts.prompt(11)))
        and len(prompts) == 50
    )


def test_tables():
    import pandas as pd

    names = ["prompt_colour_seen", "heldout_loss", "prompt_exact_unseen", "prompt_count_seen"]
    t = prompt_accuracy(pd.DataFrame({"metric": names, "value": [0.9, 0.1, 0.5, None]}))
    assert t[["attribute", "combination"]].to_numpy().tolist() == [
        ["colour", "seen"],
        ["exact", "unseen"],
    ]
