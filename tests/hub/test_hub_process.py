"""A process of its own with the environment of `make_fake_hub`: from the download call to accuracies, offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

from fake_hub import TEST_ROWS, environment

SCRIPT = """
import json, torch
import torch.nn.functional as F
from merging.suites.data.vision_tasks import VISION_TASKS, image_loader
from merging.suites.models.clip import clip_expert_state, clip_vision, preprocessing, zero_shot_head

base = "openai/clip-vit-base-patch32"
vision, preprocess, result = clip_vision(base), preprocessing(base), {}
like = {name: weight.clone() for name, weight in vision.tower.state_dict().items()}
for name in ("Cars", "SVHN"):
    task = VISION_TASKS[name]
    vision.tower.load_state_dict(clip_expert_state(task.expert_id(base), like))
    head = zero_shot_head(base, task.class_names, task.templates)
    with torch.no_grad():
        right = sum(
            int(((F.normalize(vision(images), dim=-1) @ head.T).argmax(1) == labels).sum())
            for images, labels in image_loader(task.rows("test"), preprocess)
        )
    result[name] = [list(head.shape), right]
print(json.dumps(result))
"""


def run(code: str, variables: dict[str, str]) -> subprocess.CompletedProcess:
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, **variables, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_offline_process(true_hub):
    done = run(SCRIPT, environment(true_hub))
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert [result[name][0] for name in ("Cars", "SVHN")] == [[196, 16], [10, 16]]
    assert all(0 <= right <= TEST_ROWS for _, right in result.values())


def test_import_reaches_for_nothing(tmp_path):
    heavy = "{'datasets', 'huggingface_hub', 'transformers'}"
    modules = "merging.suites.data.vision_tasks, merging.suites.data.hub_texts, merging.suites.models.clip"
    code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = run(code, environment(tmp_path))
    assert done.stdout.strip() == "[]", done.stderr[-2000:]
    assert list(tmp_path.iterdir()) == []
