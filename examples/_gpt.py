"""A byte-level GPT in plain torch, and the text it learns: the source of Python's own standard library."""

import math
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256  # one token per byte
HEAD_DIM = 64
INIT_STD = 0.02

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
MAX_TEXT_BYTES = 16 << 20
VALIDATION_EVERY = 10  # every tenth file is held out


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    The linear layers have no bias: a key bias has no effect on attention, so its gradient would be rounding noise,
    which Adam scales up to full steps.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))

    def attention(self, x: Tensor) -> Tensor:
        batch, context, width = x.shape
        q, k, v = self.qkv(x).view(batch, context, 3, width // HEAD_DIM, HEAD_DIM).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attention_out(heads.transpose(1, 2).reshape(batch, context, width))


class GPT(nn.Module):
    """Pre-norm causal transformer over bytes; the output head is tied to the token embedding.

    Args:
        context: longest sequence, in bytes.
        width: size of the residual stream, a multiple of ``HEAD_DIM``.
        layers: number of blocks.
    """

    def __init__(self, context: int, width: int, layers: int) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.apply(self._initialise)
        for block in self.blocks:  # 2 * layers branches add up in the residual stream: keep its variance
            for branch_out in (block.attention_out, block.mlp_out):
                nn.init.normal_(branch_out.weight, std=INIT_STD / math.sqrt(2 * layers))

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=INIT_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, context, 256]`` of the next byte, for ``tokens`` ``[batch, context]`` of int64."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.blocks(self.token(tokens) + self.position(positions))
        return F.linear(self.norm(x), self.token.weight)

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy, nats per byte, of ``windows`` ``[batch, context + 1]`` of int64."""
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def standard_library_text() -> tuple[Tensor, Tensor]:
    """Training and validation text, 1-D uint8 each: the standard library's modules in sorted order, split by file."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts))
    train, validation = bytearray(), bytearray()
    for index, path in enumerate(files):
        part = validation if index % VALIDATION_EVERY == 0 else train
        part += path.read_bytes()
        if len(train) + len(validation) >= MAX_TEXT_BYTES:
            break
    if not validation or not train:
        raise FileNotFoundError(f"no Python source under {root} (found {len(files)} files); use a Python that ships it")
    return torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(validation, dtype=torch.uint8)


def windows(text: Tensor, starts: Tensor, context: int) -> Tensor:
    """``[len(starts), context + 1]`` int64: the bytes of ``text`` that follow each of ``starts`` (int64)."""
    offsets = torch.arange(context + 1, device=starts.device)
    return text[starts[:, None] + offsets].long()
