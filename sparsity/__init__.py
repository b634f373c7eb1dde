"""Activation sparsity of Transformer MLPs: plug-ins that raise it, probes that measure it, the identities behind both.

"Towards the Connection between Activation Sparsity and Flat Minima", arXiv 2605.25612.

    model = sparsify(model)                      # JSReLU, zeroth biases, restricted norms; train as usual
    with probe(model) as p: …                    # density, derivative density, augmented flatness per MLP
    p.summary()
    skip_zeros(model).generate(…)                # what is zero is neither read nor computed

    model.save_pretrained(folder)                # or torch.save(model.state_dict(), file)
    model = load(Model(config), folder)
"""

from sparsity.activations import ACTIVATIONS, JSReLU, derivative, jsrelu
from sparsity.blocks import LAYOUTS, Block, Layout, find_blocks, without_mlps
from sparsity.finetuning import unfreeze
from sparsity.flatness import remaining_multiply_adds
from sparsity.plugins import PROTOCOLS, parameter_groups, sparsify
from sparsity.probes import probe
from sparsity.pruned import skip_zeros
from sparsity.saving import load

__all__ = [
    "ACTIVATIONS",
    "LAYOUTS",
    "PROTOCOLS",
    "Block",
    "JSReLU",
    "Layout",
    "derivative",
    "find_blocks",
    "jsrelu",
    "load",
    "parameter_groups",
    "probe",
    "remaining_multiply_adds",
    "skip_zeros",
    "sparsify",
    "unfreeze",
    "without_mlps",
]
