"Text: encoder, captions, stores, and the set of drawn shapes with its reader."

import gzip
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from uvit_repro import text as T
from uvit_repro.config import DataConfig, ParameterError
from uvit_repro.data.files import sha256_file
from uvit_repro.latents import StoreError

SMALL = {
    "embed_dim": 32,
    "quick_gelu": True,
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
quiet = lambda *a, **k: None


def huggingface_weights(seed=0, w=32):
    g, s = torch.Generator().manual_seed(seed), {}

    def put(name, *shape, std=0.3, mean=0.0):
        s[f"text_model.{name}"] = mean + std * torch.randn(shape, generator=g)

    put("embeddings.token_embedding.weight", 49408, w)
    put("embeddings.position_embedding.weight", 77, w)
    for i in range(2):
        l = f"encoder.layers.{i}"
        for n in ("q", "k", "v", "out"):
            put(f"{l}.self_attn.{n}_proj.weight", w, w)
            put(f"{l}.self_attn.{n}_proj.bias", w)
        put(f"{l}.mlp.fc1.weight", 4 * w, w)
        put(f"{l}.mlp.fc1.bias", 4 * w)
        put(f"{l}.mlp.fc2.weight", w, 4 * w)
        put(f"{l}.mlp.fc2.bias", w)
        for n in ("layer_norm1", "layer_norm2"):
            put(f"{l}.{n}.weight", w, mean=1.0)
            put(f"{l}.{n}.bias", w)
    put("final_layer_norm.weight", w, mean=1.0)
    put("final_layer_norm.bias", w)
    return s


def one_token_at_a_time(s, ids, heads=2):
    "CLIP's text model for one caption, token by token: each attends to itself and to those before it."
    s = {k.removeprefix("text_model."): v.double() for k, v in s.items()}
    linear = lambda n, x: s[n + ".weight"] @ x + s[n + ".bias"]

    def norm(n, x):
        return (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5) * s[n + ".weight"] + s[
            n + ".bias"
        ]

    x = [
        s["embeddings.token_embedding.weight"][t] + s["embeddings.position_embedding.weight"][i]
        for i, t in enumerate(ids.tolist())
    ]
    for i in range(2):
        l = f"encoder.layers.{i}"
        h = [norm(l + ".layer_norm1", v) for v in x]
        q, k, v = ([linear(f"{l}.self_attn.{m}_proj", y).view(heads, -1) for y in h] for m in "qkv")
        for n in range(len(x)):
            out = []
            for a in range(heads):
                e = torch.stack([q[n][a] @ k[m][a] for m in range(n + 1)]) / math.sqrt(
                    q[n].shape[1]
                )
                e = (e - e.max()).exp()
                out.append(sum(c * v[m][a] for m, c in enumerate(e / e.sum())))
            y = x[n] + linear(l + ".self_attn.out_proj", torch.cat(out))
            z = linear(l + ".mlp.fc1", norm(l + ".layer_norm2", y))
            x[n] = y + linear(l + ".mlp.fc2", z / (1 + torch.exp(-1.702 * z)))
    return torch.stack([norm("final_layer_norm", v) for v in x])


@pytest.fixture(scope="module")
def weights():
    return huggingface_weights()


@pytest.fixture(scope="module")
def enc(weights):
    tower = T.build_tower(SMALL)
    tower.load_state_dict(T.text_weights(weights))
    return T.ClipText(tower, "made")


def test_import_is_cheap():
    code = "import sys, uvit_repro.text; bad = {'open_clip', 'diffusers', 'torch_fidelity', 'torchvision', 'pandas', 'matplotlib', 'transformers'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_tokens_equal_the_definition(enc, weights):
    ids = enc.tokens(["Two women waiting at a bench."])
    assert torch.allclose(
        enc.encode(["Two women waiting at a bench."])[0].double(),
        one_token_at_a_time(weights, ids[0]),
        atol=1e-4,
    )


def test_open_clip_gives_the_same(enc, tmp_path):
    "The whole model of open_clip with the same weights, by its own way to all tokens."
    import open_clip

    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    (tmp_path / "tiny-text.json").write_text(json.dumps(dict(SMALL, vision_cfg=vision)))
    open_clip.add_model_config(tmp_path / "tiny-text.json")
    m = open_clip.create_model("tiny-text")
    m.load_state_dict(dict(m.state_dict(), **enc.tower.state_dict()))
    m.eval()
    ids = enc.tokens(["A dog on a mat.", ""])
    with torch.no_grad():
        x = m.ln_final(
            m.transformer(m.token_embedding(ids) + m.positional_embedding, attn_mask=m.attn_mask)
        )
    assert torch.allclose(enc.encode(["A dog on a mat.", ""]), x, atol=1e-5)
    assert T.weights_sum(T.text_weights(m.state_dict())) == enc.sha256


def test_padding_truncation_null(enc):
    ids = enc.tokens(["", "word " * 200, "hello ! !"])
    assert (
        ids[0].tolist() == [49406] + [49407] * 76
        and ids[1, -1] == 49407
        and (ids[1] == 49407).sum() == 1
    )
    assert (
        ids[2, 2] == ids[2, 3] and ids[2, 4:].eq(49407).all()
    )  # a real "!" (its id is not 0 behind a space) stays
    assert torch.allclose(enc.null, enc.encode(["", "x"])[0], atol=1e-5)


def test_weights_absent_or_foreign(tmp_path, weights):
    with pytest.raises(FileNotFoundError, match="hf_hub_download"):
        T.load_clip(tmp_path)
    with pytest.raises(FileNotFoundError, match="mine.safetensors"):
        T.load_clip(tmp_path, str(tmp_path / "mine.safetensors"))
    from safetensors.torch import save_file

    (tmp_path / "clip").mkdir()
    save_file(weights, tmp_path / "clip" / "model.safetensors")
    with pytest.raises(ParameterError, match="ViT-L-14-quickgelu"):
        T.load_clip(tmp_path)  # a small one is not the real one
    assert T.load_clip(tmp_path, config=SMALL).width == 32


def annotations(root, split, ids, n=5):
    d = root / "coco" / "annotations"
    d.mkdir(parents=True, exist_ok=True)
    (d / f"captions_{split}2014.json").write_text(
        json.dumps(
            {
                "images": [{"id": i, "file_name": f"COCO_{split}2014_{i:012d}.jpg"} for i in ids],
                "annotations": [
                    {"id": 10 * i + k, "image_id": i, "caption": f"{split} {i} caption {k}"}
                    for i in ids
                    for k in range(n + i % 2)
                ],
            }
        )
    )


def made_coco(root, train=(3, 1, 2, 4), val=(9, 8, 7)):
    rng = np.random.default_rng(0)
    for split, ids in (("train", train), ("val", val)):
        annotations(root, split, ids)
        (root / "coco" / f"{split}2014").mkdir()
        for i in ids:
            Image.fromarray(rng.integers(0, 256, (24, 30 + i, 3), np.uint8)).save(
                root / "coco" / f"{split}2014" / f"COCO_{split}2014_{i:012d}.jpg"
            )


def test_captions_of_coco(tmp_path):
    annotations(tmp_path, "train", (5, 2, 9))
    p = tmp_path / "coco" / "annotations" / "captions_train2014.json"
    c = T.read_captions(p)
    assert (
        [x.id for x in c] == [2, 5, 9]
        and [len(x.captions) for x in c] == [5, 6, 6]
        and c[1].captions[4] == "train 5 caption 4"
    )
    z = tmp_path / "z.json.gz"
    z.write_bytes(gzip.compress(p.read_bytes()))
    assert T.read_captions(z) == c
    prompts = T.evaluation_prompts(c, 9000)
    assert prompts[:5] == T.evaluation_prompts(c, 5)
    assert {i for i, _ in prompts[:3]} == {0, 1, 2}
    share = np.bincount([k for i, k in prompts if i == 1], minlength=6) / 3000
    assert abs(share - 1 / 6).max() < 0.03  # every caption equally often


@pytest.fixture(scope="module")
def tiny_vae():
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            mid_block_add_attention=False,
        )


def test_mscoco_from_files_to_data(tmp_path, enc, tiny_vae):
    made_coco(tmp_path)
    tiny_vae.save_pretrained(tmp_path / "autoencoders" / "tiny")
    ae = T.load_autoencoder("tiny", tmp_path)
    coco = T.Coco(tmp_path, side=16, held_out=2, prompts=5)
    cfg = DataConfig(
        dataset="mscoco256",
        img_size=8,
        in_chans=4,
        text_tokens=77,
        text_dim=32,
        latent_scale=0.2301,
    )
    with pytest.raises(FileNotFoundError, match="python -m uvit_repro.text encode"):
        T.load_mscoco256(cfg, tmp_path)
    T.encode_coco(coco, tmp_path, None, enc, batch=2, shard_rows=4, say=quiet)
    with pytest.raises(FileNotFoundError, match="mscoco256_latents is"):
        T.load_mscoco256(cfg, tmp_path)
    T.encode_coco(coco, tmp_path, ae, None, batch=2, shard_rows=4, say=quiet)
    data = T.load_mscoco256(cfg, tmp_path)
    assert (len(data), len(data.test_labels), data.shape, data.num_classes) == (
        4,
        2,
        (3, 16, 16),
        0,
    )
    rows = data.texts.rows(torch.tensor([0, 0, 3, 3]), torch.tensor([0.0, 0.9999999, 0.2, 0.99]))
    assert [data.texts.store.captions[r] for r in rows] == [
        "train 1 caption 0",
        "train 1 caption 5",
        "train 4 caption 1",
        "train 4 caption 4",
    ]
    i, k = coco.prompts[1]
    want = f"val {coco.val[i].id} caption {k}"
    assert data.texts.prompt(1) == want
    assert torch.allclose(
        data.texts.prompts(5)[1:2], enc.encode([want]), atol=1e-5
    ) and torch.allclose(data.texts.test(torch.tensor([1])), enc.encode([want]), atol=1e-5)
    with Image.open(tmp_path / "coco" / "val2014" / coco.val[i].file) as im:
        u8 = torch.from_numpy(T.coco_crop(im.convert("RGB"), 16).copy()).permute(2, 0, 1)[None]
    assert torch.allclose(
        data.test_inputs[1:2], 0.2301 * ae.encode(u8)[:, :4], atol=1e-4
    )  # the held-out image that belongs to that prompt
    with pytest.raises(ParameterError, match="5 prompts"):
        data.texts.prompts(6)
    (tmp_path / "coco" / "train2014" / coco.train[2].file).write_bytes(b"no image")
    with pytest.raises(StoreError, match=coco.train[2].file):
        coco.read(0, 4)


class Killed(BaseException):
    pass


class Fragile:
    def __init__(self, enc, calls):
        self.enc, self.left, self.length, self.width, self.sha256, self.name = (
            enc,
            calls,
            enc.length,
            enc.width,
            enc.sha256,
            enc.name,
        )

    def encode(self, texts):
        if self.left <= 0:
            raise Killed
        self.left -= 1
        return self.enc.encode(texts)


def test_killed_ten_times_gives_the_same_bytes(tmp_path, enc):
    texts = ["", *(f"caption {i}" for i in range(40))]
    how = {"batch": 2, "shard_rows": 4, "say": quiet}
    rng, deaths = random.Random(0), 0
    T.encode_texts(texts, enc, tmp_path / "a", **how)
    while deaths < 10:
        try:
            T.encode_texts(texts, Fragile(enc, rng.choice((0, 1, 1, 2))), tmp_path / "b", **how)
            break
        except Killed:
            deaths += 1
    assert deaths == 10
    T.encode_texts(texts, enc, tmp_path / "b", **how)
    files = lambda p: {f.name: sha256_file(f) for f in p.iterdir() if f.name != ".lock"}
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_flipped_byte_is_named_and_repaired(tmp_path, enc):
    texts = ["", *(f"caption {i}" for i in range(9))]
    how = {"batch": 2, "shard_rows": 4, "say": quiet}
    s = T.encode_texts(texts, enc, tmp_path / "s", **how)
    before = s.read(range(10))
    f = s.path / "contexts-00001.npy"
    raw = bytearray(f.read_bytes())
    raw[len(raw) // 2] ^= 4
    f.write_bytes(raw)
    with pytest.raises(StoreError, match="contexts-00001.npy is altered"):
        T.verify_texts(s.path)
    f.write_bytes(bytes(raw[:-1]))
    with pytest.raises(StoreError, match="contexts-00001.npy has"):
        T.TextStore(s.path)
    f.unlink()
    assert torch.equal(
        T.encode_texts(texts, Fragile(enc, 2), s.path, **how).read(range(10)), before
    )
    assert T.verify_texts(s.path)["texts"] == 10
    (s.path / "captions.json").write_text("[]")
    with pytest.raises(StoreError, match="captions.json is altered"):
        T.verify_texts(s.path)


def test_prompt_file_is_read_by_the_evaluation_of_checkpoints(tmp_path, enc):
    from uvit_repro.runs.released import Contexts

    c = Contexts(
        T.write_contexts(
            [f"prompt {i}" for i in range(7)], enc, tmp_path / "c.safetensors", batch=3
        )
    )
    assert torch.allclose(
        c[2:7], enc.encode([f"prompt {i}" for i in range(2, 7)]), atol=1e-5
    ) and torch.allclose(c.null, enc.null, atol=1e-5)
    half = Contexts(T.write_contexts(["a", "b"], enc, tmp_path / "h.safetensors", "float16"))
    assert torch.allclose(half[0:1], enc.encode(["a"]), atol=1e-2)


# shapes


@pytest.fixture(scope="module")
def shapes():
    return T.load_shapes(DataConfig(dataset="shapes", img_size=16, in_chans=3))


rates = lambda st: {k: v[0] / v[1] for k, v in st.items() if v[1]}


def test_reader_is_exact(shapes):
    asked = [T.prompt_scene(i) for i in range(300)]
    x = T.draw_pictures(asked, 1)
    st = shapes.judge(x)
    assert (
        set(rates(st).values()) == {1.0}
        and len(st) == 10
        and all(v.dtype == np.int64 and v.shape == (2,) for v in st.values())
    )
    noisy = (
        (x + 60 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
        .clamp(0, 255)
        .to(torch.uint8)
    )
    assert min(rates(shapes.judge(noisy)).values()) == 1.0
    wrong = rates(shapes.judge(x, start=2))
    assert (
        wrong["prompt_exact_seen"] < 0.05
        and wrong["prompt_colour_seen"] < 0.45
        and wrong["prompt_shape_unseen"] < 0.5
    )


def test_reader_sees_each_kind_of_mistake():
    scene = T.parse_caption("two green circles left of a yellow cross")
    x = T.draw_pictures([scene], 0)
    cell = lambda kind: torch.from_numpy(
        T.object_cell(T.KINDS.index(kind) if kind else -1, 1, 0)
    ).permute(2, 0, 1)
    right = lambda im: tuple(
        v[0] for v in T.judge_picture(T.read_pictures(im)[0][0].tolist(), scene).values()
    )
    assert right(x) == (3, 3, 3, 1, 1) and right(x.flip(-1)) == (
        3,
        3,
        0,
        1,
        0,
    )  # a mirror image has the right objects on the wrong side
    y = x.clone()
    y[0, :, :8, :8] = cell(("blue", "circle"))
    assert right(y) == (2, 3, 3, 1, 0)
    y[0, :, :8, :8] = cell(("green", "square"))
    assert right(y) == (3, 2, 3, 1, 0)
    y[0, :, :8, :8] = cell(None)
    assert right(y) == (2, 2, 2, 0, 0)
    assert right(torch.full_like(x, 240)) == (0, 0, 0, 0, 0)


def test_unseen_combinations_are_kept_out(shapes):
    for x in (shapes.train_images, shapes.test_images):
        kinds, certain, d = T.read_pictures(x)
        assert (
            certain.all()
            and d.max() < 1e-2
            and not {T.KINDS[k] for k in kinds.flatten().tolist() if k >= 0} & set(T.UNSEEN)
        )
    assert {c for c, _ in T.UNSEEN} == set(T.COLOURS) and {f for _, f in T.UNSEEN} == set(
        T.FORMS
    )  # each colour and each form is known from other combinations
    assert not {p.tobytes() for p in shapes.train_images.numpy()} & {
        p.tobytes() for p in shapes.test_images.numpy()
    }


def test_captions_and_scenes_are_one_to_one():
    scenes = [T.draw_scene(random.Random(i), i % 3 == 0) for i in range(2000)]
    for s in scenes:
        assert T.parse_caption(T.caption(s)) == s and sorted(
            T.parse_caption(T.caption(s, 1)).objects()
        ) == sorted(s.objects())
    with pytest.raises(ParameterError, match="purple"):
        T.parse_caption("a purple circle above a red square")
    with pytest.raises(ParameterError, match="dog"):
        T.encode_words("a red dog")


def test_texts_of_shapes(shapes):
    t, i = shapes.texts, torch.arange(200)
    a, b = t.read(i, torch.zeros(200)), t.read(i, torch.full((200,), 0.999))
    assert a.shape == (200, T.TEXT_TOKENS, T.TEXT_DIM) and (a != b).flatten(1).any(1).all()
    assert (
        torch.equal(t.null, T.encode_words(""))
        and torch.equal(t.prompts(50)[10:12][1], T.encode_words(t.prompt(11)))
        and len(t.prompts(50)) == 50
    )
    codes = torch.stack([T.word_code(w) for w in T.VOCABULARY])
    assert (codes @ codes.T / T.WORD_BITS - torch.eye(len(codes))).abs().max() < 0.7
    assert (
        shapes.sha256 == T.load_shapes(DataConfig(dataset="shapes", img_size=16, in_chans=3)).sha256
    )


def test_command_line(tmp_path, capsys):
    for args, said in (
        (["encode"], "curl"),
        (["prompts", "--out", "p"], "curl"),
        (["verify"], "no store of texts"),
        (["prompts", "--released", "--out", "p"], "hf_hub_download"),
    ):
        assert T.main([*args, "--data-root", str(tmp_path)]) == 1
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit) as e:
        T.main(["--help"])
    assert e.value.code == 0 and "examples:" in capsys.readouterr().out
