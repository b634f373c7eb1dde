"""What a network is trained on from scratch: its model, its training batches, its loss and how it is scored.

sparsity.studies.images and sparsity.studies.span_corruption build tasks; experiments see only `Task`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.training import TrainingRecipe

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A data set with the network that learns it.

    Args:
        key: changes with anything below; what is trained on the task is cached under it.
        model: builds the untrained network; draws from torch's global generator.
        loss: maps (network, training batch) to the training loss, a mean over the samples of the batch.
        loader: maps (recipe, seed) to a loader of `recipe.steps` global training batches, augmented.
        batches: maps a split ("train", "validation", "test") to its fixed evaluation batches, not augmented.
        score: maps (network, evaluation batch) to the loss and the metric of each of its B samples: (B,), (B,) float.
        metric: what the second one is, with its unit: "accuracy, %" or "token accuracy, %".
        masks: maps a batch to the positions of it that hold real tokens, {path prefix in the network: (B, T) bool};
            None where all do.
    """

    key: str
    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    loader: Callable[[TrainingRecipe, int], DataLoader]
    batches: Callable[[str], Iterable[Batch]]
    score: Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]
    metric: str
    masks: Callable[[Batch], Mapping[str, Tensor]] | None = None


def as_it_is(batch: Batch) -> Batch:
    """Return the batch: the `collate_fn` of loaders whose data set hands out whole batches."""
    return batch
