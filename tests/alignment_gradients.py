"""Which weights the gradient of an alignment loss reaches, by strategy: a table from a small random flow in fp64.

`python tests/alignment_gradients.py` prints it for docs/results.md; tests/test_alignment_gradients.py asserts it.
The loss is FlowBack's (arXiv 2511.22345, eq. 4): minus the mean cosine of targets and projected features.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from tiny import images, make_flow
from torch import Tensor, nn

import biflow

BLOCKS, LAYERS, WIDTH = 4, 2, 16
SHAPE = {"img_size": 8, "num_blocks": BLOCKS, "layers_per_block": LAYERS, "width": WIDTH, "num_classes": 3}
STRATEGIES = ("forward", "detach", "reverse, cached", "reverse, live")


class Setting:
    """A flow (16 tokens, 4 blocks of 2 layers), images, labels, a projector and random targets."""

    def __init__(self, **config):
        self.flow = make_flow(dtype=torch.float64, **{**SHAPE, **config})
        self.x = images(self.flow)
        classes = self.flow.config.num_classes
        self.y = torch.arange(len(self.x)) % (classes + 1) - 1 if classes else None
        generator = torch.Generator().manual_seed(7)
        self.targets = torch.randn(len(self.x), self.flow.config.tokens, 8, generator=generator, dtype=torch.float64)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            layers = (nn.Linear(WIDTH, 24), nn.SiLU(), nn.Linear(24, 24), nn.SiLU(), nn.Linear(24, 8))
            self.projector = nn.Sequential(*layers).double()

    def features(self, strategy: str, block: int, layer: int) -> Tensor:
        """h (B,T,C) of a layer, on the graph of the strategy."""
        if strategy.startswith("reverse"):
            context = strategy.removeprefix("reverse, ")
            found = biflow.pseudo_reverse(self.flow, self.x, self.y, context=context, features=[(block, layer)])
            return found.features[block, layer]
        states = self.flow.encode(self.x, self.y, return_states=True)[2]
        given, own = states[block], self.flow.blocks[block]
        given = given.detach() if strategy == "detach" else given
        given = given.flip(1) if own.config.flip else given
        h = own.features(given, self.y, None, (layer,))[1][layer]
        return h.flip(1) if own.config.flip else h

    def state(self, context: str, block: int) -> Tensor:
        """x_block (B,T,D) of the pseudo-reverse: what block `block` makes of the state above it."""
        return biflow.pseudo_reverse(self.flow, self.x, self.y, context=context).states[block]

    def loss(self, h: Tensor) -> Tensor:
        return -F.cosine_similarity(self.targets, self.projector(h), dim=-1).mean()

    def gradients(self, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
        """By block ("0", ...) and "projector": the gradient of all its weights in one vector."""
        parts = {str(i): list(block.parameters()) for i, block in enumerate(self.flow.blocks)}
        parts["projector"] = list(self.projector.parameters())
        flat = [p for part in parts.values() for p in part]
        grads = torch.autograd.grad(loss(), flat, allow_unused=True)
        found = {id(p): torch.zeros_like(p) if g is None else g for p, g in zip(flat, grads, strict=True)}
        return {name: torch.cat([found[id(p)].flatten() for p in part]) for name, part in parts.items()}

    def aligned(self, strategy: str, block: int, layer: int) -> dict[str, Tensor]:
        """The gradients of the alignment loss of one layer's features."""
        return self.gradients(lambda: self.loss(self.features(strategy, block, layer)))


def table(setting: Setting, blocks: tuple[int, ...] = (0, 2, 3), layer: int = 0) -> list[str]:
    """Markdown: the norm of the gradient by aligned block and strategy; 0 is exactly zero."""
    names = [*map(str, range(BLOCKS)), "projector"]
    heads = [f"block {n}" if n.isdigit() else n for n in names]
    lines = [f"| loss on | strategy | {' | '.join(heads)} |", "|---" * (len(names) + 2) + "|"]

    def add(what: str, strategy: str, grads: dict[str, Tensor]) -> None:
        cells = ["0" if not grads[n].any() else f"{float(grads[n].norm()):.3g}" for n in names]
        lines.append(f"| {what} | {strategy} | {' | '.join(cells)} |")

    for block in blocks:
        for strategy in STRATEGIES:
            add(f"block {block}, layer {layer}", strategy, setting.aligned(strategy, block, layer))
    for context in ("cached", "live"):  # the mean of x_0^3: no projector in it
        add(
            "the state x_0 itself",
            f"reverse, {context}",
            setting.gradients(lambda context=context: setting.state(context, 0).pow(3).mean()),
        )
    return lines


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n".join(table(Setting())))
