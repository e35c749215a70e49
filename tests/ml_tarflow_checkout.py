"""A checkout with ml-tarflow's interface and this repository's oracle behind it."""

CHECKOUT = '''
import torch
from oracle_tarflow import Oracle

class Block:
    def __init__(self, oracle, index):
        self.oracle, self.index = oracle, index

    def reverse(self, x, y=None):
        """Writes into its argument, as it may."""
        u = x.flip(1) if self.index % 2 else x
        for t in range(1, u.shape[1]):
            a, b = self.oracle._network(self.index, u, y, 1.0)
            u[:, t] = u[:, t] * torch.exp(a[:, t - 1]) + b[:, t - 1]
        return u.flip(1) if self.index % 2 else u

class Model:
    def __init__(self, in_channels, img_size, patch_size, channels, num_blocks, layers_per_block, nvp, num_classes):
        self.size, self.patch, self.count = img_size, patch_size, num_blocks

    def eval(self):
        return self

    def to(self, device):
        return self

    def load_state_dict(self, state):
        oracle = Oracle(state, 64)
        self.var, self.blocks = state["var"], [Block(oracle, i) for i in range(self.count)]

    def reverse(self, x, y=None):
        x = x * self.var.sqrt()
        for block in reversed(self.blocks):
            x = block.reverse(x, y)
        size, patch = (self.size, self.size), self.patch
        return torch.nn.functional.fold(x.mT, size, patch, stride=patch)
'''
