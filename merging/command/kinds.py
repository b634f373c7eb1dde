"""What a tensor's name says of its kind: embedding, table of positions, output over tokens, classifier of a task.

Names are all that a file without a configuration has; where more is known, it decides (`merging.command.vocabulary`).
"""

import re

EMBEDDING = re.compile(r"emb|(^|\.)(wte|wpe|shared)\.", re.IGNORECASE)
POSITIONS = re.compile(r"pos_?emb|position|wpe\b|pos_bias|embed_pos")
OTHER_EMBEDDING = re.compile(r"classif|token_type|patch")
OUTPUT = re.compile(r"lm_head|predictions|decoder\.(weight|bias)$")
CLASSIFIER = re.compile(r"(^|[._])(classifiers?|heads?|score|fc|logits?|logits_proj|qa_outputs|cls|label\w*)([._]|$)")
IN_A_LAYER = re.compile(r"\.\d+\.")


def is_embedding(name: str) -> bool:
    """Return whether a name is that of an embedding, of whatever: tokens, positions, types, patches."""
    return bool(EMBEDDING.search(name))


def is_of_positions(name: str) -> bool:
    """Return whether a name is that of a table or bias of positions."""
    return bool(POSITIONS.search(name))


def is_of_tokens(name: str) -> bool:
    """Return whether a name is that of an embedding of tokens or of an output over them."""
    other = is_of_positions(name) or OTHER_EMBEDDING.search(name)
    return not other and (is_embedding(name) or bool(OUTPUT.search(name)))


def is_of_classes(name: str) -> bool | None:
    """Return whether a name is that of the head of a task; None if it says nothing, False if it is something else."""
    if is_embedding(name) or is_of_positions(name) or OUTPUT.search(name):
        return False
    return True if CLASSIFIER.search(name) and not IN_A_LAYER.search(name) else None
