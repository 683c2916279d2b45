"""What is the network, how many parameters has it, and how many FLOPs does it take?

A diffusion transformer (DiT) that predicts the velocity of a rectified flow. Three architectures, which differ in how the
image learns of text and time, and share all else: patches, embeddings, attention, MLP, head.

    incontext   time, text and image tokens in one sequence, through plain pre-norm transformer blocks
                (the main model of Liang et al., arXiv 2410.08184)
    cross       image tokens attend to each other, then to the text; the time shifts, scales and gates them (adaLN-single)
                (PixArt-alpha, arXiv 2310.00426)
    mmdit       image and text are two streams with their own weights, joined in one attention; time and the mean of the
                words shift, scale and gate both (adaLN-Zero)  (Stable Diffusion 3, arXiv 2403.03206)

`python model.py [ARCH]` prints the family of models. This file knows nothing of noise or of data.

N = parameters (in the blocks, unless it is said otherwise), C = training FLOPs. Shapes in the comments:
B batch, T tokens in the sequence, S text tokens, W width, H heads, F features of a text token.
"""
import math
import sys
from dataclasses import dataclass, field
from typing import Literal, Optional, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

MUP_BASE_WIDTH = 64  # under mup, `lr` is the rate of a model of this width
TIME_FEATURES = 256  # sines and cosines that a time is turned into, as in DiT
Arch = Literal["incontext", "cross", "mmdit"]


@dataclass(frozen=True)
class ModelConfig:
    arch: Arch = field(default="incontext", metadata={"help": "architecture (the paper's main one: incontext)"})
    depth: int = field(default=2, metadata={"help": "number of transformer blocks"})
    width: Optional[int] = field(default=None, metadata={"help": "width of a token (default: aspect * depth)"})
    aspect: int = field(default=16, metadata={"help": "width / depth where --width is not given (the paper: 64)"})
    head_dim: int = field(default=8, metadata={"help": "width of an attention head (the paper: 64)"})
    patch: int = field(default=2, metadata={"help": "side of a patch, in pixels"})
    qk_norm: bool = field(default=True, metadata={"help": "normalise queries and keys (the paper: not)"})
    parametrization: Literal["mup", "sp"] = field(default="mup", metadata={
        "help": f"mup: rate of hidden matrices lr*{MUP_BASE_WIDTH}/width; sp: lr for everything (the paper)"})

    def __post_init__(self):
        if self.arch not in get_args(Arch):
            raise ValueError(f"--arch {self.arch}: is none of {', '.join(get_args(Arch))}")
        if self.depth < 1:
            raise ValueError(f"--depth {self.depth}: must be at least 1")
        if self.width is None:
            object.__setattr__(self, "width", self.aspect * self.depth)
        if self.width < 1:
            raise ValueError(f"--width {self.width} (or --aspect {self.aspect}): must be at least 1")
        if self.head_dim < 1 or self.width % self.head_dim:
            raise ValueError(f"--width {self.width} is not divisible by --head_dim {self.head_dim}: "
                             f"take a width that is a multiple of {self.head_dim}, or another --head_dim")
        if self.width % 4:
            raise ValueError(f"--width {self.width} is not divisible by 4, which the 2-D sin-cos positions need")


def sincos(position, features):
    """Sines and cosines of positions, at unit scale (root mean square 1), (n,) -> (n, features).

    The frequencies of Vaswani et al. 2017, from 1 to 1/10,000. Unit scale matters: with small learned positions the
    model sits on a plateau, not knowing which patches are neighbours, for most of a small budget.
    """
    frequency = torch.exp(-math.log(10_000) * torch.arange(features // 2, device=position.device) / (features // 2))
    angle = position.float()[:, None] * frequency[None, :]
    return math.sqrt(2) * torch.cat([angle.sin(), angle.cos()], dim=-1)


def sincos_2d(rows, columns, width):
    """Half of the features tell the row, half the column: (rows * columns, width)."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat([sincos(row.flatten(), width // 2), sincos(column.flatten(), width // 2)], dim=-1)


def attend(q, k, v, mask=None):
    """Attention of heads, each (B, H, its tokens, head_dim) -> (B, tokens of q, W). mask: which keys are seen (None: all)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # By hand: torch's own attention on a CPU has no bfloat16 products, and takes twice as long.
        with torch.autocast("cpu", enabled=False):   # which would copy the scores to float32 and back; the softmax sums in float32 by itself
            scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)                # (B, H, T, T)
            scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
            attended = scores.softmax(-1) @ v                                        # (B, H, T, head_dim)
    else:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)           # (B, H, T, head_dim)
    return rearrange(attended, "b h t d -> b t (h d)")


class HeadNorm(nn.RMSNorm):
    def forward(self, heads):
        # On a CPU torch wants one dtype, or warns of its slow path; on a GPU autocast computes it in float32.
        weight = self.weight.type_as(heads) if heads.device.type == "cpu" else self.weight
        return F.rms_norm(heads, self.normalized_shape, weight, self.eps)


class Attention(nn.Module):
    """The layers before and after `attend`. cross: only queries are made of the tokens; keys and values are of the text."""

    def __init__(self, config, cross=False):
        super().__init__()
        W, self.head_dim = config.width, config.head_dim
        if cross:
            self.q, self.kv = nn.Linear(W, W), nn.Linear(W, 2 * W)
        else:
            self.qkv = nn.Linear(W, 3 * W)
        self.out = nn.Linear(W, W)
        # Unbounded attention logits are what makes large transformers diverge; normalised ones cannot grow.
        self.q_norm = HeadNorm(config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(config.head_dim) if config.qk_norm else nn.Identity()

    def heads(self, tokens, text=None):
        """tokens (B, T, W), text (B, S, W) for cross -> q (B, H, T, head_dim), k and v (B, H, T or S, head_dim)."""
        def split(projected, n):
            return rearrange(projected, "b t (n h d) -> n b h t d", n=n, d=self.head_dim)

        if text is None:
            q, k, v = split(self.qkv(tokens), 3)
        else:
            (q,), (k, v) = split(self.q(tokens), 1), split(self.kv(text), 2)
        return self.q_norm(q).type_as(v), self.k_norm(k).type_as(v), v

    def forward(self, tokens, text, mask):
        return self.out(attend(*self.heads(tokens, text), mask))                     # (B, T, W)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc_in = nn.Linear(config.width, 4 * config.width)
        self.fc_out = nn.Linear(4 * config.width, config.width)

    def forward(self, tokens):
        return self.fc_out(F.gelu(self.fc_in(tokens), approximate="tanh"))


class Norm(nn.LayerNorm):
    """Layer norm. Its shift and scale are parameters, or (adaLN) given for each image, (B, 1, W)."""

    def forward(self, tokens, shift=None, scale=None):
        normed = super().forward(tokens)
        return normed if shift is None else normed * (1 + scale) + shift


class Modulation(nn.Linear):
    """adaLN: the vectors that shift, scale and gate the tokens of an image, c (B, W) -> (n, B, 1, W). Zero at the start,
    so that each block begins as the identity (adaLN-Zero; Peebles and Xie, DiT, arXiv 2212.09748)."""

    def __init__(self, width, n):
        super().__init__(width, n * width)

    def forward(self, c):
        return rearrange(super().forward(F.silu(c)), "b (n w) -> n b 1 w", w=self.in_features)


def gated(branch, gate):
    return branch if gate is None else gate * branch


class Block(nn.Module):
    """A stream of tokens through attention and MLP, each behind a norm and added to the stream.

    incontext: that is all. cross: in between, the stream attends to the text (without norm or gate, as in PixArt), and what is
    the block's own in its modulation is a table (6, W) (adaLN-single). mmdit: a linear layer of its own makes the modulation,
    and JointBlock attends, between `heads` and `add`. last_text: nothing reads the text after the last layer, so there its
    stream ends in heads (as in SD3, which computes the queries too and leaves them).
    A modulation m is (shift1, scale1, gate1, shift2, scale2, gate2), each (B, 1, W), or None without adaLN.
    """

    def __init__(self, config, last_text=False):
        super().__init__()
        W, plain = config.width, config.arch == "incontext"
        self.norm1 = Norm(W, elementwise_affine=plain)
        self.attention = Attention(config)
        self.norm2 = Norm(W, elementwise_affine=plain)
        self.mlp = MLP(config)
        if config.arch == "cross":
            self.cross_attention = Attention(config, cross=True)
            self.table = nn.Parameter(torch.zeros(6, W))
        if config.arch == "mmdit":
            self.modulation = Modulation(W, 2 if last_text else 6)
        if last_text:
            self.attention.out = self.norm2 = self.mlp = None

    def heads(self, tokens, m):
        return self.attention.heads(self.norm1(tokens, *m[:2]))

    def add(self, tokens, attended, m, text=None, text_mask=None):
        _, _, gate1, shift2, scale2, gate2 = m
        tokens = tokens + gated(self.attention.out(attended), gate1)
        if text is not None:
            tokens = tokens + self.cross_attention(tokens, text, text_mask)
        return tokens + gated(self.mlp(self.norm2(tokens, shift2, scale2)), gate2)

    def forward(self, tokens, mask=None, c=None, text=None, text_mask=None):
        """tokens (B, T, W) -> the same. cross: c (6, B, 1, W), the same for all blocks, text (B, S, W), text_mask (B, 1, 1, S)."""
        m = 6 * (None,) if c is None else c + self.table[:, None, None]
        return self.add(tokens, attend(*self.heads(tokens, m), mask), m, text, text_mask)


class JointBlock(nn.Module):
    """A layer of mmdit: two streams with their own weights, whose queries, keys and values meet in one attention."""

    def __init__(self, config, last):
        super().__init__()
        self.image, self.text, self.last = Block(config), Block(config, last_text=last), last

    def forward(self, image, text, mask, c):
        """image (B, T_image, W), text (B, S, W), mask (B, 1, 1, T_image + S), c (B, W) -> image, text."""
        m_image, m_text = self.image.modulation(c), self.text.modulation(c)
        parts = self.image.heads(image, m_image), self.text.heads(text, m_text)
        attended = attend(*(torch.cat(pair, dim=2) for pair in zip(*parts)), mask)               # (B, T_image + S, W)
        of_image, of_text = attended.split([image.shape[1], text.shape[1]], dim=1)
        return self.image.add(image, of_image, m_image), text if self.last else self.text.add(text, of_text, m_text)


class DiT(nn.Module):
    """The velocity v(x_t, t, text, text_mask).

    config: ModelConfig. channels, size: of the square images or latents; text_tokens S and text_dim F: of the caption
    features. Raises ValueError for a patch that does not divide the image.
    """

    def __init__(self, config, channels=3, size=16, text_tokens=16, text_dim=32):
        super().__init__()
        if size % config.patch:
            raise ValueError(f"--patch {config.patch} does not divide the image side {size}: "
                             f"take a --patch or a --resolution that fits")
        self.config, self.channels, self.size = config, channels, size
        self.text_tokens, self.text_dim = text_tokens, text_dim
        W, side, arch = config.width, size // config.patch, config.arch
        self.image_tokens = side * side
        self.patch_in = nn.Linear(config.patch ** 2 * channels, W)
        self.text_in = nn.Linear(text_dim, W)
        self.time_in = nn.Sequential(nn.Linear(TIME_FEATURES, W), nn.SiLU(), nn.Linear(W, W))
        if arch == "mmdit":
            self.blocks = nn.ModuleList(JointBlock(config, last=k == config.depth - 1) for k in range(config.depth))
            self.pooled_in = nn.Linear(text_dim, W)  # SD3 reads CLIP's pooled text here; ours is the mean of the words
            self.head_modulation = Modulation(W, 2)
        else:
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        if arch == "cross":
            self.modulation = Modulation(W, 6)
            self.head_table = nn.Parameter(torch.zeros(2, W))
        self.norm = Norm(W, elementwise_affine=arch == "incontext")
        self.head = nn.Linear(W, config.patch ** 2 * channels)
        # Fixed, hence no parameters; made anew from the configuration, hence not in the state dict.
        self.register_buffer("image_positions", sincos_2d(side, side, W), persistent=False)             # (T_image, W)
        self.register_buffer("text_positions", sincos(torch.arange(text_tokens), W), persistent=False)  # (S, W)
        self.initialise()

    def initialise(self):
        """Every linear layer keeps the scale of its input, every residual branch starts small, the output at zero.

        Branches of cross and mmdit start at zero: their gates do, and PixArt's projection of the cross-attention, which has none.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features ** -0.5
                if name.endswith(("attention.out", "mlp.fc_out")):  # 2 * depth branches add up to one (GPT-2)
                    std /= math.sqrt(2 * self.config.depth)
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
            if isinstance(module, Modulation) or name.endswith("cross_attention.out"):
                nn.init.zeros_(module.weight)
        nn.init.zeros_(self.head.weight)

    def forward(self, x_t, t, text, text_mask):
        """x_t (B, channels, size, size), t (B,), text (B, S, F), text_mask (B, S) bool -> v, of the shape of x_t.

        Text slots that are masked out are seen by no token, so their content is irrelevant; a caption with no real
        token at all is the unconditional model.
        """
        p, S = self.config.patch, self.text_tokens
        if text.shape[1:] != (S, self.text_dim) or text_mask.shape != text.shape[:2]:
            raise ValueError(f"text {tuple(text.shape)} and text_mask {tuple(text_mask.shape)}: "
                             f"this model takes (B, {S}, {self.text_dim}) and (B, {S})")
        image = rearrange(x_t, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)       # (B, T_image, p*p*channels)
        image = self.patch_in(image) + self.image_positions                          # (B, T_image, W)
        time = self.time_in(sincos(1000 * t, TIME_FEATURES).type_as(x_t))            # (B, W)
        if self.config.arch == "incontext":
            text = self.text_in(text) + self.text_positions                          # (B, S, W)
            tokens = torch.cat([time[:, None], text, image], dim=1)                  # (B, T, W)
            mask = F.pad(text_mask, (1, self.image_tokens), value=True)[:, None, None]   # (B, 1, 1, T): which keys are seen
            for block in self.blocks:
                tokens = block(tokens, mask)
            image = self.norm(tokens[:, -self.image_tokens:])                        # (B, T_image, W)
        elif self.config.arch == "cross":
            # Attention to no key at all is not defined. So an empty caption is read as one word of zeros, which no word is:
            # all that it says is the bias of text_in (and place 0), a learned "no caption" as PixArt has one.
            text = text.where(text_mask[..., None], 0)
            empty = F.pad(~text_mask.any(1, keepdim=True), (0, S - 1))
            mask = (text_mask | empty)[:, None, None]                                # (B, 1, 1, S)
            text, c = self.text_in(text) + self.text_positions, self.modulation(time)    # (B, S, W), (6, B, 1, W)
            for block in self.blocks:
                image = block(image, None, c, text, mask)
            image = self.norm(image, *(time[None, :, None] + self.head_table[:, None, None]))
        else:
            text = text.where(text_mask[..., None], 0)
            c = time + self.pooled_in(text.sum(1) / text_mask.sum(1, keepdim=True).clamp(min=1))   # (B, W)
            text = self.text_in(text) + self.text_positions                          # (B, S, W)
            mask = F.pad(text_mask, (self.image_tokens, 0), value=True)[:, None, None]   # (B, 1, 1, T_image + S)
            for block in self.blocks:
                image, text = block(image, text, mask, c)
            image = self.norm(image, *self.head_modulation(c))
        return rearrange(self.head(image), "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=p, h=self.size // p)

    def parameter_groups(self, lr):
        """Parameters for an optimiser, each group with its learning rate.

        mup, after Yang et al. 2022 (arXiv 2203.03466, table 3, Adam): a matrix whose input grows with the width gets a
        rate proportional to 1/width, and everything else (biases, norms, tables, and the matrices fed by pixels, words or
        times, whose number of inputs is fixed) keeps the rate. With that, the best `lr` of a small model is
        that of a large one too. The output is zero at the start, as the table allows. The table's 1/d in place of 1/sqrt(d)
        in the attention is for heads that grow; here they keep head_dim and grow in number, so nothing is to be changed.
        """
        if self.config.parametrization == "sp":
            return [{"params": list(self.parameters()), "lr": lr}]
        hidden = [module.weight for name, module in self.named_modules() if isinstance(module, nn.Linear)
                  and name not in ("patch_in", "text_in", "pooled_in", "time_in.0")]
        chosen = {id(weight) for weight in hidden}
        other = [parameter for parameter in self.parameters() if id(parameter) not in chosen]
        return [{"params": hidden, "lr": lr * MUP_BASE_WIDTH / self.config.width}, {"params": other, "lr": lr}]

    def count_parameters(self):
        """N by group: {"blocks", "embedding", "head", "total"}. The law is of the blocks by default.

        The one modulation of cross, which its blocks share, is a part of what embeds the time, as in PixArt's own count.
        """
        N = {"blocks": 0, "embedding": 0, "head": 0}
        for name, parameter in self.named_parameters():
            group = "blocks" if name.startswith("blocks.") else "head" if name.startswith(("norm.", "head")) else "embedding"
            N[group] += parameter.numel()
        return {**N, "total": sum(N.values())}

    def tokens(self):
        """Tokens of one image, as D counts them: {"image", "text", "time"}; all text slots are computed, so all count.

        The same for every arch (as the paper says), whether text and time are in the sequence, beside it, or in the norms.
        """
        return {"image": self.image_tokens, "text": self.text_tokens, "time": 1}

    def count_flops(self):
        """Forward FLOPs of one image, by kind of module: each linear layer times the tokens it sees, and the two
        products of attention; 2 FLOPs for a multiply-add, nothing for the rest, as torch.utils.flop_counter counts."""
        def linear(*layers):
            return sum(2 * layer.in_features * layer.out_features for layer in layers if layer is not None)

        I, S, W, arch = self.image_tokens, self.text_tokens, self.config.width, self.config.arch
        T = {"incontext": I + S + 1, "cross": I, "mmdit": I + S}[arch]   # tokens that attend to one another
        flops = {
            "embedding": I * linear(self.patch_in) + S * linear(self.text_in) + linear(self.time_in[0], self.time_in[2]),
            "attention projections": 0, "attention": 0, "mlp": 0, "modulation": 0,
            "head": I * linear(self.head),
        }
        for block in self.blocks:
            for stream, n in [(block.image, I), (block.text, S)] if arch == "mmdit" else [(block, T)]:
                flops["attention projections"] += n * linear(stream.attention.qkv, stream.attention.out)
                flops["mlp"] += n * linear(stream.mlp.fc_in, stream.mlp.fc_out) if stream.mlp else 0
            flops["attention"] += 2 * (2 * T * T * W)
            if arch == "cross":
                cross = block.cross_attention
                flops["attention projections"] += I * linear(cross.q, cross.out) + S * linear(cross.kv)
                flops["attention"] += 2 * (2 * I * S * W)
        if arch == "mmdit":
            flops["embedding"] += linear(self.pooled_in)
        flops["modulation"] = linear(*(module for module in self.modules() if isinstance(module, Modulation)))  # once an image
        return flops

    def flops_per_image(self, count="exact"):
        """Training FLOPs of one image. "exact": 3 times the counted forward pass (a backward pass is two of them);
        "6nd": the paper's 6 * N * D, with N the parameters of the blocks and D all tokens of the image."""
        if count == "6nd":
            return 6 * self.count_parameters()["blocks"] * sum(self.tokens().values())
        return 3 * sum(self.count_flops().values())


def family(name):
    """[(depth, width), ...] of the named family: the sizes whose runs make a law.

    "paper": widths of 64 * depth, 2 to 15 layers, and the 27 layers of the billion that the paper extrapolates to
    (arXiv 2410.08184; the aspect is our choice, it brackets every optimum of theirs). "quick": the same idea for a laptop.
    An aspect kept exactly would leave three sizes; with 12 to 24 there are nine, each 1.3 to 2.2 times the one before.
    """
    if name == "paper":
        return [(depth, 64 * depth) for depth in [*range(2, 16), 27]]
    return [(1, 16), (1, 24), (2, 24), (2, 32), (2, 40), (2, 48), (3, 48), (3, 64), (4, 64)]


# The input that a family's FLOPs are counted for: latents of a 256-pixel image with CLIP ViT-L/14 text, and small scenes.
FAMILY_INPUT = {"paper": dict(channels=4, size=32, text_tokens=77, text_dim=768),
                "quick": dict(channels=3, size=16, text_tokens=16, text_dim=64)}
FAMILY_CONFIG = {"paper": dict(aspect=64, head_dim=64, qk_norm=False, parametrization="sp"), "quick": {}}


def model_table(name, arch="incontext"):
    """The family as lines of text: depth, width, N by group, tokens and training FLOPs of an image in both counts."""
    lines = [f"{name:>6} depth width    N blocks N embedding   N head     N total tokens FLOPs/image       6ND 6ND/exact"]
    for depth, width in family(name):
        with torch.device("meta"):  # shapes without memory
            model = DiT(ModelConfig(arch, depth, width, **FAMILY_CONFIG[name]), **FAMILY_INPUT[name])
        N, exact, approximate = model.count_parameters(), model.flops_per_image(), model.flops_per_image("6nd")
        lines.append(f"{depth:12d} {width:5d} {N['blocks']:11,d} {N['embedding']:11,d} {N['head']:8,d} {N['total']:11,d} "
                     f"{sum(model.tokens().values()):6d} {exact:11.3e} {approximate:9.2e} {approximate / exact:9.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    for arch in sys.argv[1:] or ["incontext"]:
        if arch not in get_args(Arch):
            print(f"model.py: {arch}: is none of {', '.join(get_args(Arch))}", file=sys.stderr)
            sys.exit(2)
        for name in FAMILY_INPUT:
            print(f"{arch}\n{model_table(name, arch)}\n")
