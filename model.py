"""What is the network, how many parameters has it, and how many FLOPs does it take?

A diffusion transformer (DiT) that predicts the velocity of a rectified flow. `arch="incontext"` is the plain one:
time, text and image tokens in one sequence, through pre-norm transformer blocks, with no other conditioning
(the main model of Liang et al., arXiv 2410.08184).

`python model.py` prints the family of models. This file knows nothing of noise or of data.

N = parameters (in the blocks, unless it is said otherwise), C = training FLOPs. Shapes in the comments:
B batch, T tokens in the sequence, S text tokens, W width, H heads, F features of a text token.
"""
import math
import sys
from argparse import ArgumentParser
from dataclasses import dataclass, field
from typing import Literal, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from transformers import HfArgumentParser

MUP_BASE_WIDTH = 64  # under mup, `lr` is the rate of a model of this width
TIME_FEATURES = 256  # sines and cosines that a time is turned into, as in DiT


def parse_flags(types, description, presets={}, positional=None, rest=False, argv=None):
    """One instance of each dataclass from the command line. What is wrong is one line, and exit status 2.

    presets: {name: defaults that --preset name puts in the place of the fields' own}; a flag given wins over both.
    positional: the field that a first word without a flag is for. rest: return what is not understood as a last list.
    """
    argv = sys.argv[1:] if argv is None else argv
    if positional and argv and not argv[0].startswith("-"):
        argv = [f"--{positional}", *argv]
    parser = HfArgumentParser(types, description=description.splitlines()[0], allow_abbrev=False)

    def error(message):
        print(f"{parser.prog}: {message}", file=sys.stderr)
        sys.exit(2)
    parser.error = error
    if presets:
        first = ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset", default=next(iter(presets)))
        first.error = error
        parser.set_defaults(**presets.get(first.parse_known_args(argv)[0].preset, {}))
    try:
        *configs, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except ValueError as problem:
        error(problem)
    if rest:
        return [*configs, unknown]
    if unknown:
        error(f"unknown flag or value {' '.join(unknown)} (--help lists the flags)")
    return configs


@dataclass(frozen=True)
class ModelConfig:
    arch: Literal["incontext"] = field(default="incontext", metadata={"help": "architecture"})
    depth: int = field(default=2, metadata={"help": "number of transformer blocks"})
    width: Optional[int] = field(default=None, metadata={"help": "width of a token (default: aspect * depth)"})
    aspect: int = field(default=16, metadata={"help": "width / depth where --width is not given (the paper: 64)"})
    head_dim: int = field(default=8, metadata={"help": "width of an attention head (the paper: 64)"})
    patch: int = field(default=2, metadata={"help": "side of a patch, in pixels"})
    qk_norm: bool = field(default=True, metadata={"help": "normalise queries and keys (the paper: not)"})
    parametrization: Literal["mup", "sp"] = field(default="mup", metadata={
        "help": f"mup: rate of hidden matrices lr*{MUP_BASE_WIDTH}/width; sp: lr for everything (the paper)"})

    def __post_init__(self):
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


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        # Unbounded attention logits are what makes large transformers diverge; normalised ones cannot grow.
        self.q_norm = nn.RMSNorm(config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim) if config.qk_norm else nn.Identity()

    def forward(self, tokens, mask):
        q, k, v = rearrange(self.qkv(tokens), "b t (three h d) -> three b h t d", three=3, d=self.head_dim)
        q, k = self.q_norm(q).type_as(v), self.k_norm(k).type_as(v)  # norms run in float32 under autocast
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)           # (B, H, T, head_dim)
        return self.out(rearrange(attended, "b h t d -> b t (h d)"))                 # (B, T, W)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc_in = nn.Linear(config.width, 4 * config.width)
        self.fc_out = nn.Linear(4 * config.width, config.width)

    def forward(self, tokens):
        return self.fc_out(F.gelu(self.fc_in(tokens), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, tokens, mask):
        tokens = tokens + self.attention(self.norm1(tokens), mask)
        return tokens + self.mlp(self.norm2(tokens))


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
        W, side = config.width, size // config.patch
        self.image_tokens = side * side
        self.patch_in = nn.Linear(config.patch ** 2 * channels, W)
        self.text_in = nn.Linear(text_dim, W)
        self.time_in = nn.Sequential(nn.Linear(TIME_FEATURES, W), nn.SiLU(), nn.Linear(W, W))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(W)
        self.head = nn.Linear(W, config.patch ** 2 * channels)
        # Fixed, hence no parameters; made anew from the configuration, hence not in the state dict.
        self.register_buffer("image_positions", sincos_2d(side, side, W), persistent=False)             # (T_image, W)
        self.register_buffer("text_positions", sincos(torch.arange(text_tokens), W), persistent=False)  # (S, W)
        self.initialise()

    def initialise(self):
        """Every linear layer keeps the scale of its input, every residual branch starts small, the output at zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features ** -0.5
                if name.endswith(("attention.out", "mlp.fc_out")):  # 2 * depth branches add up to one (GPT-2)
                    std /= math.sqrt(2 * self.config.depth)
                nn.init.normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
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
        text = self.text_in(text) + self.text_positions                              # (B, S, W)
        time = self.time_in(sincos(1000 * t, TIME_FEATURES).type_as(x_t))[:, None]   # (B, 1, W)
        tokens = torch.cat([time, text, image], dim=1)                               # (B, T, W)
        mask = F.pad(text_mask, (1, self.image_tokens), value=True)[:, None, None]   # (B, 1, 1, T): which keys are seen
        for block in self.blocks:
            tokens = block(tokens, mask)
        v = self.head(self.norm(tokens[:, -self.image_tokens:]))                     # (B, T_image, p*p*channels)
        return rearrange(v, "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=p, h=self.size // p)

    def parameter_groups(self, lr):
        """Parameters for an optimiser, each group with its learning rate.

        mup, after Yang et al. 2022 (arXiv 2203.03466, table 3, Adam): a matrix whose input grows with the width gets a
        rate proportional to 1/width, and everything else (biases, norms, and the matrices fed by pixels, words or
        times, whose number of inputs is fixed) keeps the rate. With that, the best `lr` of a small model is
        that of a large one too. The output is zero at the start, as the table allows.
        """
        if self.config.parametrization == "sp":
            return [{"params": list(self.parameters()), "lr": lr}]
        hidden = [module.weight for name, module in self.named_modules() if isinstance(module, nn.Linear)
                  and name not in ("patch_in", "text_in", "time_in.0")]
        chosen = {id(weight) for weight in hidden}
        other = [parameter for parameter in self.parameters() if id(parameter) not in chosen]
        return [{"params": hidden, "lr": lr * MUP_BASE_WIDTH / self.config.width}, {"params": other, "lr": lr}]

    def count_parameters(self):
        """N by group: {"blocks", "embedding", "head", "total"}. The law is of the blocks by default."""
        N = {"blocks": 0, "embedding": 0, "head": 0}
        for name, parameter in self.named_parameters():
            group = "blocks" if name.startswith("blocks.") else "head" if name.startswith(("norm.", "head.")) else "embedding"
            N[group] += parameter.numel()
        return {**N, "total": sum(N.values())}

    def tokens(self):
        """Tokens in the sequence of one image: {"image", "text", "time"}; all text slots are computed, so all count."""
        return {"image": self.image_tokens, "text": self.text_tokens, "time": 1}

    def count_flops(self):
        """Forward FLOPs of one image, by kind of module: each linear layer times the tokens it sees, and the two
        products of attention; 2 FLOPs for a multiply-add, nothing for the rest, as torch.utils.flop_counter counts."""
        def linear(layer):
            return 2 * layer.in_features * layer.out_features

        T, L, W = sum(self.tokens().values()), self.config.depth, self.config.width
        block = self.blocks[0]
        return {
            "embedding": self.image_tokens * linear(self.patch_in) + self.text_tokens * linear(self.text_in)
                         + linear(self.time_in[0]) + linear(self.time_in[2]),
            "attention projections": L * T * (linear(block.attention.qkv) + linear(block.attention.out)),
            "attention": L * 2 * (2 * T * T * W),
            "mlp": L * T * (linear(block.mlp.fc_in) + linear(block.mlp.fc_out)),
            "head": self.image_tokens * linear(self.head),
        }

    def flops_per_image(self, count="exact"):
        """Training FLOPs of one image. "exact": 3 times the counted forward pass (a backward pass is two of them);
        "6nd": the paper's 6 * N * D, with N the parameters of the blocks and D all tokens of the sequence."""
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


def model_table(name):
    """The family as lines of text: depth, width, N by group, tokens and training FLOPs of an image in both counts."""
    lines = [f"{name:>6} depth width    N blocks N embedding   N head     N total tokens FLOPs/image       6ND 6ND/exact"]
    for depth, width in family(name):
        with torch.device("meta"):  # shapes without memory
            model = DiT(ModelConfig(depth=depth, width=width, **FAMILY_CONFIG[name]), **FAMILY_INPUT[name])
        N, exact, approximate = model.count_parameters(), model.flops_per_image(), model.flops_per_image("6nd")
        lines.append(f"{depth:12d} {width:5d} {N['blocks']:11,d} {N['embedding']:11,d} {N['head']:8,d} {N['total']:11,d} "
                     f"{sum(model.tokens().values()):6d} {exact:11.3e} {approximate:9.2e} {approximate / exact:9.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    for name in FAMILY_INPUT:
        print(model_table(name) + "\n")
