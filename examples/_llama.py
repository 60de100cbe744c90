"""A Llama-3-shaped transformer in plain torch, and a simple tokenizer that fills its vocabulary from a text."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

INIT_STD = 0.02
LOGIT_STD = 0.2  # at the start, so that the first loss is within 0.1 of ln(vocabulary)
NORM_EPS = 1e-5
ROPE_BASE = 500_000.0
LOSS_CHUNK = 1024  # tokens whose logits exist at a time: 128,256 float32 logits of one token are half a megabyte


@dataclass(frozen=True)
class Shape:
    vocabulary: int
    width: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


LLAMA_3_8B = Shape(vocabulary=128256, width=4096, ffn=14336, layers=32, heads=32, kv_heads=8)
TINY = Shape(vocabulary=2048, width=64, ffn=224, layers=2, heads=4, kv_heads=2)


def rotations(context: int, head_dim: int, device: torch.device) -> Tensor:
    """Cosines and sines of every position and pair of features, float32 ``[2, context, head_dim / 2]``."""
    frequencies = ROPE_BASE ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.arange(context, device=device, dtype=torch.float32)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary position embedding of ``x`` ``[batch, heads, context, head_dim]``: feature i is paired with i + half."""
    cos, sin = rotation
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); grouped queries, SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv_width = shape.kv_heads * shape.head_dim
        self.attention_norm = nn.RMSNorm(shape.width, eps=NORM_EPS)
        self.q = nn.Linear(shape.width, shape.width, bias=False)
        self.k = nn.Linear(shape.width, kv_width, bias=False)
        self.v = nn.Linear(shape.width, kv_width, bias=False)
        self.attention_out = nn.Linear(shape.width, shape.width, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.width, eps=NORM_EPS)
        self.gate = nn.Linear(shape.width, shape.ffn, bias=False)
        self.up = nn.Linear(shape.width, shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        normed = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))

    def attention(self, x: Tensor, rotation: Tensor) -> Tensor:
        batch, context, width = x.shape

        def heads(projection: nn.Linear) -> Tensor:
            return projection(x).view(batch, context, -1, self.shape.head_dim).transpose(1, 2)

        q, k, v = rotate(heads(self.q), rotation), rotate(heads(self.k), rotation), heads(self.v)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.attention_out(out.transpose(1, 2).reshape(batch, context, width))


class Llama(nn.Module):
    """Decoder with RMSNorm, rotary positions, grouped-query attention, SwiGLU, and an untied head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=NORM_EPS)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    @classmethod
    def create(cls, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> "Llama":
        """With random weights, made where and as they stay: no copy in float32, none in host memory."""
        with torch.device("meta"):
            model = cls(shape).to(dtype)
        model.to_empty(device=device)
        model.initialise(torch.Generator(device).manual_seed(seed))
        return model

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        # 2 * layers branches add up in the residual stream: keep its variance.
        branch_std = INIT_STD / math.sqrt(2 * self.shape.layers)
        stds = {end: branch_std for block in self.blocks for end in (block.attention_out, block.down)}
        stds[self.head] = LOGIT_STD / math.sqrt(self.shape.width)
        for module in self.modules():
            if isinstance(module, nn.RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(std=stds.get(module, INIT_STD), generator=generator)

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy, nats per token, of ``windows`` ``[batch, context + 1]`` of int64.

        Blocks keep their input only, and the head nothing: both are computed again in the backward pass.
        """
        inputs, targets = windows[:, :-1], windows[:, 1:].flatten()
        rotation = rotations(inputs.shape[1], self.shape.head_dim, inputs.device)
        x = self.token(inputs)
        for block in self.blocks:
            x = recomputed(block, x, rotation)
        chunks = zip(self.norm(x).flatten(0, 1).split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
        losses = [recomputed(self._loss_sum, hidden, target) for hidden, target in chunks]
        return torch.stack(losses).sum() / targets.numel()

    def _loss_sum(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.head(hidden).float(), targets, reduction="sum")


def recomputed(function, *inputs: Tensor) -> Tensor:
    """``function(*inputs)``, whose activations are not kept; there is no randomness to replay."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class Tokenizer:
    """256 bytes, then the most frequent words of a text, then its most frequent pairs of words: lossless and simple.

    Words are runs of letters and digits with the space before them, of white space, or of anything else. What is not
    in the vocabulary is spelt in bytes.
    """

    WORDS = re.compile(r" ?\w+|\s+|[^\w\s]+")
    ENCODING = "latin-1"  # one character for each byte, whatever the text's own encoding

    def __init__(self, text: bytes, vocabulary: int) -> None:
        words = self._words(text)
        singles = [word for word, _ in Counter(words).most_common(vocabulary - 256)]
        room = vocabulary - 256 - len(singles)
        pairs = [pair for pair, _ in Counter(pairwise(words)).most_common(room)]
        self._ids = {word: index for index, word in enumerate([*singles, *pairs], start=256)}

    def encode(self, text: bytes) -> Tensor:
        """1-D int32."""
        return torch.tensor(list(self._encode(self._words(text))), dtype=torch.int32)

    def decode(self, tokens: Tensor) -> bytes:
        spelt = {index: "".join(word) for word, index in self._ids.items()}
        return "".join(spelt.get(token) or chr(token) for token in tokens.tolist()).encode(self.ENCODING)

    def _words(self, text: bytes) -> list[str]:
        return self.WORDS.findall(text.decode(self.ENCODING))

    def _encode(self, words: list[str]) -> Iterator[int]:
        ids, index = self._ids, 0
        while index < len(words):
            pair = ids.get(tuple(words[index : index + 2]))
            single = ids.get(words[index])
            if pair is not None:
                yield pair
                index += 1  # and one more below
            elif single is not None:
                yield single
            else:
                yield from words[index].encode(self.ENCODING)
            index += 1
