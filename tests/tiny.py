"""Encoders of no weight in their genuine formats, and data sets in theirs, for tests and reading.py. Nothing is downloaded."""
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image


def tiny_vae(folder, widths=(8, 16, 16), seed=0):
    """An AutoencoderKL of diffusers with random weights; of its latents each has 2^(len(widths) - 1) pixels a side."""
    import diffusers
    torch.manual_seed(seed)
    n = len(widths)
    vae = diffusers.AutoencoderKL(block_out_channels=widths, down_block_types=("DownEncoderBlock2D",) * n, norm_num_groups=4,
                                  up_block_types=("UpDecoderBlock2D",) * n, layers_per_block=1, latent_channels=4, sample_size=16)
    vae.save_pretrained(folder)
    return str(folder)


def tiny_clip(folder, seed=0, positions=77, width=32):
    """The text half of a CLIP with random weights, and its tokenizer of letters and two merges (vocab.json, merges.txt)."""
    import transformers
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,."
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "an</w>", "em", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\na n</w>\ne m\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}))
    torch.manual_seed(seed)
    end = len(vocabulary) - 1
    transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=positions, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end)).save_pretrained(folder)
    return f"clip:{folder}"


def tiny_t5(folder):
    """The encoder of a T5 with random weights, and its tokenizer of letters (a unigram model in tokenizer.json)."""
    import tokenizers
    import transformers
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁an", -3.0), *((letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(pieces), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3,
                                                      feed_forward_proj="gated-gelu")).save_pretrained(folder)
    return f"t5:{folder}"


def picture(k, side=20, format="PNG", mode="RGB", **more):
    """The bytes of an image file, a different one for each k: blobs, as smooth as photographs are."""
    small = np.random.default_rng(k).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((side + 3, side), Image.Resampling.BICUBIC).convert(mode).save(file, format, **more)
    return file.getvalue()


def caption(k):
    return f"an emoji of thing number {k}"


def write_parquet(path, images, texts, kind=pa.string(), **columns):
    """images: bytes, or a path as a string, or None; texts of the Arrow type `kind`."""
    cells = [{"bytes": one if isinstance(one, bytes) else None, "path": one if isinstance(one, str) else None} for one in images]
    table = {"image": pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())])), "text": pa.array(texts, kind), **columns}
    pq.write_table(pa.table(table), path)
    return str(path)


def parquet(path, n=60, first=0):
    return write_parquet(path, [picture(k) for k in range(first, first + n)], [caption(k) for k in range(first, first + n)])


def webdataset(path, n=60):
    with tarfile.open(path, "w") as tar:
        for k in range(n):
            for suffix, content in (("png", picture(k)), ("txt", caption(k).encode()), ("json", json.dumps({"said": caption(k)}).encode())):
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
