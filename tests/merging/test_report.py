"""The report: one file that needs nothing else, with the numbers of `diagnose`, and the same however it is made."""

import re
import signal
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch
from models_on_disk import content, experts_of, in_fork, killed, models, saved, state_of
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from common.lab.results import RESULTS, load
from merging import MERGERS, diagnose, diagnosis, task_vector
from merging.calibration import published_alpha
from merging.command import findings
from merging.command.main import main, merge
from merging.command.recipe import Recipe
from merging.command.report import places
from merging.suites import controls, prediction
from merging.unrelated import Unrelated

PAPER = "https://arxiv.org/abs/2602.05536"
VOID = {"meta", "br", "link", "img"}
LAYERS = {f"model.layers.{index}.{kind}": (12, 8) for index in range(3) for kind in ("mlp.up", "attn.q")}


class Page(HTMLParser):
    """The elements of a page with their attributes, and whether all of them are closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def report_of(folder):
    return (folder / "index.html").read_text(encoding="utf-8"), pd.read_csv(folder / "matrices.csv")


def layered(tmp_path, count=3):
    base = state_of(**LAYERS, embedding=(20, 8), norm=(8,))
    return base, experts_of(base, count), *models(tmp_path, base, experts_of(base, count))


def test_the_page_needs_nothing_else_and_names_no_local_path(tmp_path):
    _, _, where, others = layered(tmp_path)
    merge(Recipe(where, others, "task_arithmetic", svc=True, report=True), tmp_path / "out")
    text, _ = report_of(tmp_path / "out" / "report")
    page = Page(text)
    assert page.open == [] and text.count("<svg") == 4
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed"}, tag
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in {"src", "srcset"}
            if name in {"href", "xlink:href"}:
                assert value == PAPER or value.startswith("#")
    assert not re.search(r"url\((?!#)|@import|@font-face", text)
    assert re.findall(r"https?://[^\s\"<]+", text) == [PAPER]
    assert str(tmp_path) not in text and str(tmp_path.parent) not in text
    assert all(name in page.text for name in ("base: base", "E1: e0", "E2: e1", "E3: e2", "task_arithmetic"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert targets <= set(ids)
    alts = [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"]
    assert len(alts) == 4 and all(len(alt) > 40 for alt in alts)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert not re.search(r"#(222222|0072b2|8a8a8a|dddddd)", text.split("</style>")[1], re.IGNORECASE)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare", "tsv_m", "iso_c", "star"])
def test_its_numbers_are_those_of_diagnose_and_of_unrelated_updates(tmp_path, method):
    base, experts, where, others = layered(tmp_path)
    merge(Recipe(where, others, method, report=True), tmp_path / "out")
    text, table = report_of(tmp_path / "out" / "report")
    tasks = [task_vector(expert, base) for expert in experts]
    found = diagnose(MERGERS[method](tasks), tasks, alpha=published_alpha(method, 3))
    assert sorted(table["tensor"]) == sorted(f"{name}.weight" for name in LAYERS)
    for _, row in table.iterrows():
        seen = found[row["tensor"]]
        for key, value in diagnosis.totals([seen]).items():
            assert row[key] == pytest.approx(value, rel=2e-3, abs=1e-5), key
        assert row["overlap"] == pytest.approx(float(diagnosis.overlap_between_tasks(seen)), rel=1e-3)
        assert row["overlap, by chance"] == pytest.approx(8 / 12, rel=1e-5)  # k/m
        assert row["γ, median"] == pytest.approx(float(seen.gamma[: seen.rank].quantile(0.5)), rel=2e-3)
        spectra = [torch.linalg.svdvals(task[row["tensor"]]) for task in tasks]
        drawn = [Unrelated(row["tensor"], (12, 8), spectrum, i) for i, spectrum in enumerate(spectra)]
        largest = torch.linalg.svdvals(MERGERS[method](drawn)[row["tensor"]])[0]
        expected = float(largest / torch.stack(spectra)[:, 0].mean())
        assert row["inflation, largest σ, by chance"] == pytest.approx(expected, rel=1e-3)
    for column in ("inflation, largest σ", "overlap", "γ, median"):
        assert f">{table[column].mean():.3g}<" in text


@pytest.mark.parametrize("options, found", [
    ({"kernels": True}, {"conv.weight": (8, 27), "moe.weight[0]": (10, 9), "moe.weight[1]": (10, 9)}),
    ({"split_qkv": True}, {"in_proj_weight": (8, 8)}),
    ({"space": "input"}, {"in_proj_weight": (24, 8), "moe.weight[0]": (10, 9)}),
    ({"output": "adapter", "rank": 2}, {"in_proj_weight": (24, 8)}),
])  # fmt: skip
def test_kernels_stacks_and_parts_of_fused_weights_have_chance_levels_of_their_own_shape(tmp_path, options, found):
    base = state_of(conv=(8, 3, 3, 3), moe=(2, 10, 9), lin=(12, 10)) | {"in_proj_weight": torch.randn(24, 8)}
    where, others = models(tmp_path, base, experts_of(base, 2))
    merge(Recipe(where, others, "task_arithmetic", svc=True, report=True, **options), tmp_path / "out")
    text, table = report_of(tmp_path / "out" / "report")
    table = table.set_index("tensor")
    for name, shape in found.items():
        side = shape[1] if options.get("space") == "input" else shape[0]
        assert table.loc[name, "overlap, by chance"] == pytest.approx(min(8, *shape) / side, rel=1e-5)
        assert table.loc[name, "overlap"] <= 1 + 1e-6 and table.loc[name, "inflation, largest σ, by chance"] > 0
    assert Page(text).open == []


def test_sizes_and_cosines_are_those_of_the_whole_updates(tmp_path):
    base, experts, where, others = layered(tmp_path)
    merge(Recipe(where, others, "weight_average", report=True), tmp_path / "out")
    text, _ = report_of(tmp_path / "out" / "report")
    tasks = [torch.cat([t.flatten() for t in task_vector(expert, base).values()]).double() for expert in experts]
    whole = torch.cat([tensor.flatten() for tensor in base.values()]).double()
    for index, task in enumerate(tasks):
        cells = [100 * task.norm() / whole.norm(), *(torch.cosine_similarity(task, other, 0) for other in tasks)]
        row = "".join(f"<td>{float(cell):.3g}</td>" for cell in cells)
        assert f'<th scope="row">E{index + 1}</th>{row}' in text


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})])

    def forward(self, x):
        return self.layers[0]["down"](self.layers[0]["up"](x))


def adapters(tmp_path, config):
    torch.manual_seed(0)
    base = Small()
    where = saved(tmp_path / "base", base.state_dict())
    for index in range(2):
        model = get_peft_model(Small(), config)
        for name, parameter in model.named_parameters():
            if "lora" in name or "ia3" in name:
                parameter.data += 0.3 * torch.randn(parameter.shape)
        model.save_pretrained(tmp_path / f"a{index}")
    return where, (str(tmp_path / "a0"), str(tmp_path / "a1"))


def test_it_advises_the_scale_at_which_the_sum_has_the_norm_of_the_experts(tmp_path):
    base, own, where, others = layered(tmp_path)
    merge(Recipe(where, others, "task_arithmetic", report=True), tmp_path / "out")
    text, _ = report_of(tmp_path / "out" / "report")
    updates = [torch.cat([(expert[name] - base[name]).double().flatten() for name in base]) for expert in own]
    scale = float(sum(update.norm() for update in updates) / len(updates) / sum(updates).norm())
    assert f"multiplied by {scale:.2g}, the sum" in text

    merge(Recipe(where, others[:1], "task_arithmetic", report=True), tmp_path / "one")
    assert "Where to start" not in report_of(tmp_path / "one" / "report")[0]


def test_updates_that_cancel_have_no_scale_to_start_at():
    assert findings.advice([{"products": [[1.0, -1.0], [-1.0, 1.0]]}]) == findings.advice([]) == ""
    assert "multiplied by 0.5, the sum" in findings.advice([{"products": [[1.0, 1.0], [1.0, 1.0]]}])


def test_what_is_advised_is_what_the_committed_run_measured():
    data = load(RESULTS / "32_predicting_interference" / "laptop")
    costs = prediction.starts(data).set_index(["group", "scale"]).loc[("glyph-96, 2 to 8 tasks", "norm-matched")]
    mean, low, high = (f"{costs[name]:.1f}" for name in ("mean", "low", "high"))
    eight = data[(data.metric == "norm-matched") & (data.tasks == 8)].value.mean()
    text = findings.advice([{"products": [[1.0, 0.0], [0.0, 1.0]]}])
    assert f"it scored {mean} points [{low}, {high}] above" in text and f"and {-eight:.1f} below it in the mean" in text
    assert set(data.tasks) == {2, 4, 8} and data.seed.nunique() == 1

    found = controls.pooled(load(RESULTS / "33_svc_controls" / "workstation"), controls.CONTROLS)
    lost = found[(found.condition == controls.WHOLE_OVER_TUNED) & (found.method == "task_arithmetic")].iloc[0]
    assert f"three seeds) {-lost['mean']:.1f} points [{-lost.high:.1f}, {-lost.low:.1f}] below one tuned on 128" in text


@pytest.mark.parametrize("config, count", [
    (LoraConfig(r=2, target_modules=["up", "down"]), 2),
    (IA3Config(target_modules=["up", "down"], feedforward_modules=["down"]), 2),
])  # fmt: skip
def test_adapters_are_reported_too(tmp_path, config, count):
    where, others = adapters(tmp_path, config)
    for index, options in enumerate(({}, {"output": "adapter", "rank": 1} if isinstance(config, LoraConfig) else {})):
        out = tmp_path / f"out{index}"
        merge(Recipe(where, others, "task_arithmetic", svc=True, report=True, **options), out)
        text, table = report_of(out / "report")
        empty = table.columns[table.isna().any()]
        assert len(table) == count and set(empty) <= {"s, lower half"}  # there is none of so few directions
        assert Page(text).open == [] and "How far the experts moved" in text
        assert (table["overlap, by chance"] < 0.3).all()
        assert ("is not in the adapter" in text) == bool(options)


def test_without_a_matrix_it_says_so(tmp_path):
    base = state_of(norm=(8,), embedding=(20, 8))
    where, others = models(tmp_path, base, experts_of(base, 2))
    merge(Recipe(where, others, "weight_average", report=True), tmp_path / "out")
    assert "No matrix was diagnosed" in (tmp_path / "out" / "report" / "index.html").read_text()


def test_one_expert_has_no_overlap(tmp_path):
    _, _, where, others = layered(tmp_path)
    merge(Recipe(where, others[:1], "weight_average", report=True), tmp_path / "out")
    text, table = report_of(tmp_path / "out" / "report")
    assert table["overlap"].isna().all() and "With one expert there is no overlap" in text and "nan" not in text


@pytest.mark.parametrize("method, options", [("ties", {"set": ("*:scope=global",)}), ("task_arithmetic", {})])
def test_a_report_alone_is_the_same_and_writes_no_weights(tmp_path, method, options, capsys):
    _, _, where, others = layered(tmp_path)
    recipe = Recipe(where, others, method, svc=True, report=True, **options)
    merge(recipe, tmp_path / "out")
    flags = ["--base", where, "--experts", *others, "--method", method, "--svc", "--report-only"]
    flags += [part for text in recipe.set for part in ("--set", text)]
    assert main([*flags, "--out", str(tmp_path / "alone"), "--jobs", "2"]) == 0
    assert content(tmp_path / "alone") == content(tmp_path / "out" / "report")
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == ["index.html", "matrices.csv"]
    assert main([*flags, "--out", str(tmp_path / "alone")]) == 0  # again over its own
    capsys.readouterr()
    assert main([*flags, "--out", str(tmp_path / "out")]) == 1
    assert "out: holds something else than a report; choose another --out" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*partial"))


def test_a_killed_merge_ends_with_the_same_report(tmp_path):
    _, _, where, others = layered(tmp_path)
    recipe = Recipe(where, others, "task_arithmetic", svc=True, report=True, shard_size="500B")
    merge(recipe, tmp_path / "whole")

    def work():
        with killed("pwrite", 3):
            merge(recipe, tmp_path / "out")

    assert in_fork(work) == -signal.SIGKILL
    merge(recipe, tmp_path / "out", jobs=2)
    assert content(tmp_path / "out" / "report") == content(tmp_path / "whole" / "report")


def test_places_of_layers_and_kinds():
    names = ["embed.weight", "encoder.block.1.q.weight", "encoder.block.0.q.weight", "decoder.block.0.q.weight",
             "decoder.block.0.experts.3.w1.weight", "decoder.block.0.gate_up[7]"]  # fmt: skip
    found = places(names)
    assert list(found["layer"]) == ["other", "encoder 1", "encoder 0", "decoder 0", "decoder 0", "decoder 0"]
    assert list(found["position"]) == [3, 1, 0, 2, 2, 2] and list(found["stack"]) == [2, 0, 0, 1, 1, 1]
    assert list(found["kind"]) == ["embed", "q", "q", "q", "experts.*.w1", "gate_up[*]"]
    assert list(places(["h.0.mlp.weight", "h.10.mlp.weight", "h.2.mlp.weight"])["layer"]) == ["0", "10", "2"]
