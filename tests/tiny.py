"""Small encoders in their genuine formats, and small data sets in theirs. Nothing is downloaded."""
import io
import json
import string
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image


def tiny_vae(folder, widths=(8, 16, 16), seed=0):
    """An AutoencoderKL of random weights; a latent has 2^(len(widths) - 1) pixels a side."""
    import diffusers
    torch.manual_seed(seed)
    n = len(widths)
    vae = diffusers.AutoencoderKL(
        block_out_channels=widths, down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n, layers_per_block=1, norm_num_groups=4,
        latent_channels=4, sample_size=16)
    vae.save_pretrained(folder)
    return str(folder)


def tiny_clip(folder, seed=0, positions=77, width=32):
    """The text half of a CLIP of random weights, and its tokenizer of letters and two merges."""
    import transformers
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    letters = string.ascii_lowercase + string.digits + ",."
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "an</w>", "em",
                  "<|startoftext|>", "<|endoftext|>"]
    numbers = {word: k for k, word in enumerate(vocabulary)}
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "vocab.json").write_text(json.dumps(numbers))
    (folder / "merges.txt").write_text("#version: 0.2\na n</w>\ne m\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    torch.manual_seed(seed)
    end = len(vocabulary) - 1
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=positions, bos_token_id=end - 1,
        eos_token_id=end, pad_token_id=end)
    transformers.CLIPTextModel(config).save_pretrained(folder)
    return f"clip:{folder}"


def tiny_t5(folder):
    """The encoder of a T5 of random weights, and its tokenizer of letters (a unigram model)."""
    import tokenizers
    import transformers
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁an", -3.0)]
    pieces += [(letter, -4.0) for letter in string.ascii_lowercase]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
        unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=len(pieces), d_model=24, d_kv=8, d_ff=32,
                                   num_layers=2, num_heads=3, feed_forward_proj="gated-gelu")
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return f"t5:{folder}"


def tiny_vision(kind, folder):
    """A network of transformers with random weights, in the genuine format, and its processor."""
    import transformers
    torch.manual_seed(0)
    common = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                  patch_size=8)
    sides = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    if kind == "clip":
        config = transformers.CLIPVisionConfig(intermediate_size=64, projection_dim=24, **common)
        network = transformers.CLIPVisionModelWithProjection(config)
        processor = transformers.CLIPImageProcessor(**sides)
    else:
        network = transformers.Dinov2Model(transformers.Dinov2Config(**common))
        processor = transformers.BitImageProcessor(do_center_crop=True, **sides)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return network.eval(), processor


def picture(k, side=20, format="PNG", mode="RGB", **more):
    """The bytes of an image file, a different one for each k: blobs, as smooth as photographs."""
    small = np.random.default_rng(k).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((side + 3, side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.convert(mode).save(file, format, **more)
    return file.getvalue()


def caption(k):
    return f"an emoji of thing number {k}"


def cell(image):
    """An image as datasets stores it: bytes, or a path (a string), or nothing."""
    return {"bytes": image if isinstance(image, bytes) else None,
            "path": image if isinstance(image, str) else None}


def write_parquet(path, images, texts, kind=pa.string()):
    """images: bytes, or a path as a string, or None; texts of the Arrow type `kind`."""
    kinds = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([cell(image) for image in images], kinds)
    texts = texts if isinstance(texts, pa.Array) else pa.array(texts, kind)
    pq.write_table(pa.table({"image": images, "text": texts}), path)
    return str(path)


def parquet(path, n=60, first=0):
    numbers = range(first, first + n)
    return write_parquet(path, [picture(k) for k in numbers], [caption(k) for k in numbers])


def webdataset(path, n=60):
    with tarfile.open(path, "w") as tar:
        for k in range(n):
            parts = {"png": picture(k), "txt": caption(k).encode(),
                     "json": json.dumps({"said": caption(k)}).encode()}
            for suffix, content in parts.items():
                item = tarfile.TarInfo(f"{k:04d}.{suffix}")
                item.size = len(content)
                tar.addfile(item, io.BytesIO(content))
    return str(path)


def imagefolder(folder, n=60):
    folder.mkdir()
    for k in range(n):
        (folder / f"{k:04d}.png").write_bytes(picture(k))
    lines = [json.dumps({"file_name": f"{k:04d}.png", "text": caption(k)}) for k in range(n)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)
