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

TRAINED = '''
import torch
from oracle_tarflow import Oracle

class Model(torch.nn.Module):
    """What a training step needs: parameters under ml-tarflow's names, forward, get_loss."""

    def __init__(self, in_channels, img_size, patch_size, channels, num_blocks, layers_per_block, nvp, num_classes):
        super().__init__()
        self.patch = patch_size

    def load_state_dict(self, state):
        for name, value in state.items():
            module, *path = self, *name.split(".")
            for part in path[:-1]:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module._modules[part]
            if path[-1] in ("var", "attn_mask"):
                module.register_buffer(path[-1], value)
            else:
                module.register_parameter(path[-1], torch.nn.Parameter(value))

    def forward(self, x, y=None):
        oracle = Oracle(self.state_dict(keep_vars=True), 64)
        z, logdet = oracle.encode(oracle.tokens(x, self.patch))
        return z, [], logdet

    def get_loss(self, z, logdets):
        return 0.5 * z.square().mean() - logdets.mean()
'''
