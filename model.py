"""What is the network, how many parameters has it, and how many FLOPs does it take?

A diffusion transformer (DiT) that predicts the velocity of a rectified flow. Three architectures
differ in how the image learns of text and time:

    incontext   time, text and image tokens in one sequence, through plain pre-norm blocks
                (the main model of Liang et al., arXiv 2410.08184)
    cross       image tokens attend to each other, then to the text; the time shifts, scales and
                gates them (adaLN-single; PixArt-alpha, arXiv 2310.00426)
    mmdit       image and text, two streams with their own weights, meet in one attention; time and
                text shift, scale and gate both (adaLN-Zero; Stable Diffusion 3, arXiv 2403.03206)

A fourth one is a block, a class with `build` and `transform` like InContext below, and its line in
ARCHITECTURES. A parameter of its own needs a role, a new top-level module a line in GROUPS.
`python model.py [ARCH ...]` prints the families of models. This file knows nothing of noise or of
data.
N = parameters (in the blocks, unless said otherwise), C = training FLOPs. Shapes in the comments:
B batch, T tokens in the sequence, S text tokens, W width, H heads, F features of a text token.
"""
import functools
import math
import sys
from dataclasses import dataclass, field
from typing import Literal, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

MUP_BASE_WIDTH = 64  # under mup, `lr` is the rate of a model of this width
TIME_FEATURES = 256  # sines and cosines that a time is turned into, as in DiT

@dataclass(frozen=True)
class ModelConfig:
    arch: str = field(default="incontext", metadata={
        "help": "architecture: incontext (the paper's main one), cross or mmdit"})
    depth: int = field(default=2, metadata={"help": "number of transformer blocks"})
    width: Optional[int] = field(default=None, metadata={"help": "of a token; else aspect * depth"})
    aspect: int = field(default=16, metadata={"help": "width / depth (the paper: 64)"})
    head_dim: int = field(default=8, metadata={"help": "width of a head (the paper: 64)"})
    patch: int = field(default=2, metadata={"help": "side of a patch, in pixels"})
    qk_norm: bool = field(default=True, metadata={"help": "normalise q and k (the paper: not)"})
    parametrization: Literal["mup", "sp"] = field(default="mup", metadata={
        "help": f"mup: rate of hidden matrices lr * {MUP_BASE_WIDTH} / width; sp (the paper): lr"})

    def __post_init__(self):
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"--arch {self.arch}: is none of {', '.join(ARCHITECTURES)}")
        if self.width is None:
            object.__setattr__(self, "width", self.aspect * self.depth)
        for flag in ("depth", "aspect", "width", "head_dim", "patch"):
            if getattr(self, flag) < 1:
                raise ValueError(f"--{flag} {getattr(self, flag)}: must be at least 1")
        if self.width % self.head_dim:
            raise ValueError(f"--width {self.width} is no multiple of --head_dim {self.head_dim}")
        if self.width % 4:    # sines and cosines of rows and of columns
            raise ValueError(f"--width {self.width} is no multiple of 4: take one that is")

def sincos(position, features):
    """Sines and cosines of positions, at unit scale (root mean square 1), (n,) -> (n, features).

    The frequencies of Vaswani et al. 2017, from 1 to 1/10,000. Unit scale matters: with small
    learned positions the model sits on a plateau, not knowing which patches are neighbours, for
    most of a small budget.
    """
    step = torch.arange(features // 2, device=position.device)
    frequency = torch.exp(-math.log(10_000) * step / (features // 2))
    angle = position.float()[:, None] * frequency
    return math.sqrt(2) * torch.cat([angle.sin(), angle.cos()], dim=-1)

def sincos_2d(side, width):
    """Places in a square: half of the features tell the row, half the column, (side^2, width)."""
    place = sincos(torch.arange(side), width // 2)
    return torch.cat([place.repeat_interleave(side, dim=0), place.repeat(side, 1)], dim=-1)

# The role of a parameter decides its first values and, under mup, its learning rate. Each module
# tells the roles of its own parameters, in `roles`; a parameter without one is an error.
#   input    a matrix fed by pixels, words or times: the number of its inputs is fixed
#   hidden   a matrix whose number of inputs grows with the width
#   branch   a hidden one at the end of a residual branch: small at the start
#   zero     a hidden one that is zero at the start
#   vector   a bias, a table or the weight of a norm: starts as its module made it
HIDDEN_ROLES = "hidden", "branch", "zero"
ROLES = "input", "vector", *HIDDEN_ROLES

# Which N the parameters of a module of the network are counted in.
GROUPS = {"patch_in": "embedding", "text_in": "embedding", "time_in": "embedding",
          "pooled_in": "embedding", "modulation": "embedding", "blocks": "blocks",
          "norm": "head", "head": "head", "head_table": "head", "head_modulation": "head"}

class Linear(nn.Linear):
    def __init__(self, inputs, outputs, role="hidden"):
        super().__init__(inputs, outputs)
        nn.init.zeros_(self.bias)
        self.roles = {"weight": role, "bias": "vector"}

class Norm(nn.LayerNorm):
    roles = {"weight": "vector", "bias": "vector"}

class HeadNorm(nn.RMSNorm):
    """QK-norm: attention logits without a bound are what makes large transformers diverge."""
    roles = {"weight": "vector"}

    def forward(self, heads):
        # torch on a CPU warns of a slow path where weight and heads differ in dtype. On a GPU
        # autocast computes this norm in float32, whatever the heads are.
        weight = self.weight.type_as(heads) if heads.device.type == "cpu" else self.weight
        return F.rms_norm(heads, self.normalized_shape, weight, self.eps).type_as(heads)

class Modulation(Linear):
    """adaLN: n vectors that shift, scale and gate an image's tokens, c (B, W) -> (n, B, 1, W).

    Zero at the start, so that each block begins as the identity (DiT, arXiv 2212.09748).
    """
    def __init__(self, width, n):
        super().__init__(width, n * width, role="zero")

    def forward(self, c):
        return rearrange(super().forward(F.silu(c)), "b (n w) -> n b 1 w", w=self.in_features)

def modulated(tokens, shift, scale):
    """adaLN: layer norm whose shift and scale, (B, 1, W), are the image's, not parameters."""
    return F.layer_norm(tokens, tokens.shape[-1:]) * (1 + scale) + shift

class MLP(nn.Sequential):
    def __init__(self, width):
        super().__init__()
        self.fc_in = Linear(width, 4 * width)
        self.gelu = nn.GELU(approximate="tanh")
        self.fc_out = Linear(4 * width, width, role="branch")

def attend(q, k, v, mask=None):
    """Attention of heads (B, H, tokens, head_dim) -> (B, tokens of q, W).

    mask: True where a key may be attended to, of a shape that broadcasts to (B, H, T, T).
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # By hand: torch's own attention on a CPU has no bfloat16 products, and takes twice as long.
        # Autocast would copy the scores to float32 and back; the softmax sums in float32 anyway.
        with torch.autocast("cpu", enabled=False):
            scores = q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)        # (B, H, T, T)
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf)
            attended = scores.softmax(-1) @ v                                # (B, H, T, head_dim)
    else:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)   # (B, H, T, head_dim)
    return rearrange(attended, "b h t d -> b t (h d)")

class Attention(nn.Module):
    """The layers before and after `attend`. cross: keys and values are made of the text."""
    def __init__(self, config, cross=False):
        super().__init__()
        W, self.head_dim = config.width, config.head_dim
        if cross:
            self.q = Linear(W, W)
            self.kv = Linear(W, 2 * W)
        else:
            self.qkv = Linear(W, 3 * W)
        # The cross-attention starts at zero, like PixArt's: it has no gate that would.
        self.out = Linear(W, W, role="zero" if cross else "branch")
        self.q_norm = HeadNorm(config.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(config.head_dim) if config.qk_norm else nn.Identity()

    def heads(self, tokens, text=None):
        """tokens (B, T, W), text (B, S, W) -> q, k, v, each (B, H, its tokens, head_dim)."""
        if text is None:
            q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        else:
            q, (k, v) = self.q(tokens), self.kv(text).chunk(2, dim=-1)
        q, k, v = (rearrange(x, "b t (h d) -> b h t d", d=self.head_dim) for x in (q, k, v))
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, tokens, mask=None, text=None):
        return self.out(attend(*self.heads(tokens, text), mask))             # (B, T, W)

class PlainBlock(nn.Module):
    """incontext: attention and MLP, each behind a norm and added to the tokens."""
    def __init__(self, config):
        super().__init__()
        self.norm1 = Norm(config.width)
        self.attention = Attention(config)
        self.norm2 = Norm(config.width)
        self.mlp = MLP(config.width)

    def forward(self, tokens, mask):
        """tokens (B, T, W), mask (B, 1, 1, T)."""
        tokens = tokens + self.attention(self.norm1(tokens), mask)
        return tokens + self.mlp(self.norm2(tokens))

class CrossBlock(nn.Module):
    """cross: in between, the image attends to the text, without norm or gate, as in PixArt.

    One modulation serves all blocks; a block's own part of it is a table (adaLN-single).
    """
    roles = {"table": "vector"}

    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config.width)
        self.cross_attention = Attention(config, cross=True)
        self.table = nn.Parameter(torch.zeros(6, config.width))

    def forward(self, image, modulation, text, text_mask):
        """image (B, T, W), modulation (6, B, 1, W), text (B, S, W), text_mask (B, 1, 1, S)."""
        modulation = modulation + self.table[:, None, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation            # each (B, 1, W)
        image = image + gate1 * self.attention(modulated(image, shift1, scale1))
        image = image + self.cross_attention(image, text_mask, text)
        return image + gate2 * self.mlp(modulated(image, shift2, scale2))

class Stream(nn.Module):
    """One of the two streams of a JointBlock: what it does before and after their attention."""
    def __init__(self, config, last_text=False):
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config.width)
        self.modulation = Modulation(config.width, 2 if last_text else 6)
        if last_text:
            # Nothing reads the text after the last attention, as in SD3. The layers are made and
            # dropped, because making them draws random numbers: old seeds give old weights.
            self.attention.out = self.mlp = None

    def heads(self, tokens, modulation):
        shift1, scale1 = modulation[:2]
        return self.attention.heads(modulated(tokens, shift1, scale1))

    def add(self, tokens, attended, modulation):
        gate1, shift2, scale2, gate2 = modulation[2:]
        tokens = tokens + gate1 * self.attention.out(attended)
        return tokens + gate2 * self.mlp(modulated(tokens, shift2, scale2))

class JointBlock(nn.Module):
    """mmdit: two streams with their own weights, whose queries, keys and values are joined."""
    def __init__(self, config, last):
        super().__init__()
        self.last = last
        self.image = Stream(config)
        self.text = Stream(config, last_text=last)

    def forward(self, image, text, mask, c):
        """image (B, T, W), text (B, S, W), mask (B, 1, 1, T + S), c (B, W) -> image, text."""
        of_image, of_text = self.image.modulation(c), self.text.modulation(c)    # (6, B, 1, W)
        heads = zip(self.image.heads(image, of_image), self.text.heads(text, of_text))
        q, k, v = (torch.cat(pair, dim=2) for pair in heads)                 # (B, H, T + S, ...)
        attended = attend(q, k, v, mask)                                     # (B, T + S, W)
        to_image, to_text = attended.split([image.shape[1], text.shape[1]], dim=1)
        if not self.last:
            text = self.text.add(text, to_text, of_text)
        return self.image.add(image, to_image, of_image), text

# ---- the network ---------------------------------------------------------------------------------

class Transformer(nn.Module):
    """The velocity v(x_t, t, text, text_mask): what the architectures share.

    channels, size: of the square images or latents; text_tokens S and text_dim F: of the caption
    features. Raises ValueError for a patch that does not divide the image.
    An architecture adds `build`, its blocks, and `transform`, the way of the image through them.
    """
    def __init__(self, config, channels=3, size=16, text_tokens=16, text_dim=32):
        super().__init__()
        if size % config.patch:
            raise ValueError(f"--patch {config.patch} does not divide the image side {size}: "
                             "take a --patch or a --resolution that fits")
        self.config, self.channels, self.size = config, channels, size
        self.text_tokens, self.text_dim = text_tokens, text_dim
        W, side = config.width, size // config.patch
        self.image_tokens = side ** 2
        self.patch_in = Linear(config.patch ** 2 * channels, W, role="input")
        self.text_in = Linear(text_dim, W, role="input")
        embed_time = Linear(TIME_FEATURES, W, role="input")
        self.time_in = nn.Sequential(embed_time, nn.SiLU(), Linear(W, W))
        self.build(config)
        self.head = Linear(W, config.patch ** 2 * channels, role="zero")
        # Fixed, hence no parameters; made anew from the configuration, hence not in the state dict.
        image_positions, text_positions = sincos_2d(side, W), sincos(torch.arange(text_tokens), W)
        self.register_buffer("image_positions", image_positions, persistent=False)   # (T, W)
        self.register_buffer("text_positions", text_positions, persistent=False)     # (S, W)
        self.initialise()

    def parameter_roles(self):
        """Each parameter with its role. Raises ValueError for one whose module tells none."""
        for path, module in self.named_modules():
            for name, parameter in module.named_parameters(path, recurse=False):
                role = getattr(module, "roles", {}).get(name.split(".")[-1])
                if role not in ROLES:
                    raise ValueError(f"parameter {name} has no role: {type(module).__name__}.roles "
                                     f"must tell it, one of {', '.join(ROLES)}")
                yield parameter, role

    def initialise(self):
        """Matrices keep the scale of their input, branches start small, the output at zero."""
        for parameter, role in self.parameter_roles():
            if role == "vector":
                continue
            std = parameter.shape[1] ** -0.5
            if role == "branch":    # 2 * depth branches add up to one (GPT-2)
                std /= math.sqrt(2 * self.config.depth)
            nn.init.normal_(parameter, std=0 if role == "zero" else std)

    def forward(self, x_t, t, text, text_mask):
        """x_t (B, channels, size, size), t (B,), text (B, S, F), text_mask (B, S) -> v, like x_t.

        Text slots that are masked out are seen by no token, so their content is irrelevant; a
        caption with no real token at all is the unconditional model.
        """
        p, S = self.config.patch, self.text_tokens
        if text.shape[1:] != (S, self.text_dim) or text_mask.shape != text.shape[:2]:
            raise ValueError(f"text {tuple(text.shape)} and text_mask {tuple(text_mask.shape)}: "
                             f"this model takes (B, {S}, {self.text_dim}) and (B, {S})")
        image = rearrange(x_t, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)
        image = self.patch_in(image) + self.image_positions                  # (B, T, W)
        # Steps from 0 to 1,000 as in DiT, which the frequencies of the sines are made for.
        time = self.time_in(sincos(1000 * t, TIME_FEATURES).type_as(x_t))    # (B, W)
        text = text.where(text_mask[..., None], 0)   # MMDiT takes the mean of the real words
        v = self.head(self.transform(image, time, text, text_mask))          # (B, T, p*p*channels)
        return rearrange(v, "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=p, h=self.size // p)

    def parameter_groups(self, lr):
        """Parameters for an optimiser, each group with its learning rate. The last has `lr` itself.

        mup, after Yang et al. 2022 (arXiv 2203.03466, table 3, Adam): a matrix whose input grows
        with the width gets a rate proportional to 1/width, and everything else (biases, norms,
        tables, and the matrices fed by pixels, words or times, whose number of inputs is fixed)
        keeps the rate. With that, the best `lr` of a small model is that of a large one too. The
        output is zero at the start, as the table allows. The table's 1/d in place of 1/sqrt(d) in
        the attention is for heads that grow; here they keep head_dim and grow in number, so nothing
        is to be changed.
        """
        roles = list(self.parameter_roles())   # raises ValueError for a parameter without one
        if self.config.parametrization == "sp":
            return [{"params": list(self.parameters()), "lr": lr}]
        hidden = [parameter for parameter, role in roles if role in HIDDEN_ROLES]
        other = [parameter for parameter, role in roles if role not in HIDDEN_ROLES]
        hidden_lr = lr * MUP_BASE_WIDTH / self.config.width
        return [{"params": hidden, "lr": hidden_lr}, {"params": other, "lr": lr}]

    def count_parameters(self):
        """N by group: blocks, embedding, head, total. The law is of the blocks by default.

        A modulation inside a block counts as blocks (mmdit). The one of cross, which its blocks
        share, counts as embedding, as in PixArt's own count. Raises ValueError for a module that is
        in no group.
        """
        N = {"blocks": 0, "embedding": 0, "head": 0, "total": 0}
        for name, parameter in self.named_parameters():
            module = name.split(".")[0]
            if module not in GROUPS:
                raise ValueError(f"parameter {name}: GROUPS must tell where {module} is counted")
            N[GROUPS[module]] += parameter.numel()
            N["total"] += parameter.numel()
        return N

    def tokens(self):
        """Tokens of one image, as D counts them; all text slots are computed, so all count.

        The same for every arch (as the paper says), be text and time in the sequence or beside it.
        """
        return {"image": self.image_tokens, "text": self.text_tokens, "time": 1}

    @functools.cached_property
    def forward_flops(self):
        """FLOPs of the forward pass of one image, counted once by torch.

        It runs a copy that has shapes but no memory. 2 for each multiply-add of the linear layers
        and of attention's two products, nothing for the rest.
        """
        shape = self.channels, self.size, self.text_tokens, self.text_dim
        with torch.device("meta"):
            model = type(self)(self.config, *shape)
            x_t, t = torch.empty(1, self.channels, self.size, self.size), torch.empty(1)
            text = torch.empty(1, self.text_tokens, self.text_dim)
            text_mask = torch.empty(1, self.text_tokens, dtype=torch.bool)
        counter = FlopCounterMode(display=False)
        # MATH is the attention of two plain products, which the counter sees on every device.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(x_t, t, text, text_mask)
        return counter.get_total_flops()

    def flops_per_image(self, count="exact"):
        """Training FLOPs of one image, by either count.

        "exact": 3 times the forward pass, as a backward pass is two of them.
        "6nd": the paper's 6 * N * D, N the parameters of the blocks, D all tokens of the image.
        """
        if count == "6nd":
            return 6 * self.count_parameters()["blocks"] * sum(self.tokens().values())
        return 3 * self.forward_flops

class InContext(Transformer):
    def build(self, config):
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.depth))
        self.norm = Norm(config.width)

    def transform(self, image, time, text, text_mask):
        text = self.text_in(text) + self.text_positions                      # (B, S, W)
        tokens = torch.cat([time[:, None], text, image], dim=1)              # (B, 1 + S + T, W)
        mask = F.pad(text_mask, (1, self.image_tokens), value=True)[:, None, None]
        for block in self.blocks:
            tokens = block(tokens, mask)
        return self.norm(tokens[:, -self.image_tokens:])

class Cross(Transformer):
    roles = {"head_table": "vector"}

    def build(self, config):
        self.blocks = nn.ModuleList(CrossBlock(config) for _ in range(config.depth))
        self.modulation = Modulation(config.width, 6)
        self.head_table = nn.Parameter(torch.zeros(2, config.width))

    def transform(self, image, time, text, text_mask):
        # Attention to no key at all is not defined. So an empty caption is read as one word of
        # zeros, which no word is: all that it says is the bias of text_in (and place 0), a learned
        # "no caption" as PixArt has one.
        empty = F.pad(~text_mask.any(1, keepdim=True), (0, self.text_tokens - 1))
        mask = (text_mask | empty)[:, None, None]                            # (B, 1, 1, S)
        text = self.text_in(text) + self.text_positions                      # (B, S, W)
        modulation = self.modulation(time)                                   # (6, B, 1, W)
        for block in self.blocks:
            image = block(image, modulation, text, mask)
        return modulated(image, *(time[None, :, None] + self.head_table[:, None, None]))

class MMDiT(Transformer):
    def build(self, config):
        last = config.depth - 1
        self.blocks = nn.ModuleList(JointBlock(config, k == last) for k in range(config.depth))
        # SD3 reads CLIP's pooled text here; ours is the mean of the words.
        self.pooled_in = Linear(self.text_dim, config.width, role="input")
        self.head_modulation = Modulation(config.width, 2)

    def transform(self, image, time, text, text_mask):
        words = text_mask.sum(1, keepdim=True).clamp(min=1)                  # (B, 1)
        c = time + self.pooled_in(text.sum(1) / words)                       # (B, W)
        text = self.text_in(text) + self.text_positions                      # (B, S, W)
        mask = F.pad(text_mask, (self.image_tokens, 0), value=True)[:, None, None]
        for block in self.blocks:
            image, text = block(image, text, mask, c)
        return modulated(image, *self.head_modulation(c))

ARCHITECTURES = {"incontext": InContext, "cross": Cross, "mmdit": MMDiT}

def DiT(config, **shape):
    """The model that `config` names; shape: of its input, see Transformer."""
    return ARCHITECTURES[config.arch](config, **shape)

# The input that a family's FLOPs are counted for: latents of a 256-pixel image with CLIP ViT-L/14
# text, and small scenes.
FAMILY_INPUT = {"paper": dict(channels=4, size=32, text_tokens=77, text_dim=768),
                "quick": dict(channels=3, size=16, text_tokens=16, text_dim=64)}
FAMILY_CONFIG = {"paper": dict(aspect=64, head_dim=64, qk_norm=False, parametrization="sp"),
                 "quick": {}}

def family(name):
    """[(depth, width), ...] of the named family: the sizes whose runs make a law.

    "paper": widths of 64 * depth, 2 to 15 layers, and the 27 layers of the billion that the paper
    extrapolates to (arXiv 2410.08184; the aspect is our choice, it brackets every optimum of
    theirs). "quick": the same idea for a laptop. An aspect kept exactly would leave three sizes;
    with 12 to 24 there are nine, each 1.3 to 2.2 times the one before.
    """
    if name == "paper":
        return [(depth, 64 * depth) for depth in [*range(2, 16), 27]]
    return [(1, 16), (1, 24), (2, 24), (2, 32), (2, 40), (2, 48), (3, 48), (3, 64), (4, 64)]

def model_table(name, arch="incontext"):
    """The family as lines of text: N by group, tokens, FLOPs of an image in both counts."""
    lines = [f"{name} depth width      blocks   embedding        head     total N tokens "
             "FLOPs/image       6ND 6ND/exact"]
    for depth, width in family(name):
        with torch.device("meta"):  # shapes without memory
            config = ModelConfig(arch, depth, width, **FAMILY_CONFIG[name])
            model = DiT(config, **FAMILY_INPUT[name])
        N = " ".join(f"{number:11,d}" for number in model.count_parameters().values())
        exact, rough = model.flops_per_image(), model.flops_per_image("6nd")
        lines.append(f"{depth:11d} {width:5d} {N} {sum(model.tokens().values()):6d} "
                     f"{exact:11.3e} {rough:9.2e} {rough / exact:9.3f}")
    return "\n".join(lines)

if __name__ == "__main__":
    words = sys.argv[1:] or ["incontext"]
    if {"-h", "--help"} & set(words):
        print(__doc__)
        sys.exit()
    for arch in words:
        if arch not in ARCHITECTURES:
            print(f"model.py: {arch}: is none of {', '.join(ARCHITECTURES)}", file=sys.stderr)
            sys.exit(2)
        for name in FAMILY_INPUT:
            print(f"{arch}\n{model_table(name, arch)}\n")
