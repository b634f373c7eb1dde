"""Differences and their application: exact, pure, and clear about bad input."""

import pytest
import torch

from merging import apply, task_vector
from merging.task_vectors import check, check_choice, matrices_without


def model(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(3, 4, generator=generator).to(dtype),
        "bias": torch.randn(3, generator=generator).to(dtype),
        "steps": torch.tensor([seed]),
        "mask": torch.tensor([True, False]),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_difference_and_application_are_inverse_and_leave_integers_alone(dtype):
    pretrained, finetuned = model(0, dtype), model(1, dtype)
    difference = task_vector(finetuned, pretrained)
    assert difference.keys() == {"weight", "bias"} and difference["weight"].dtype == dtype
    state = apply(pretrained, difference)
    assert state.keys() == pretrained.keys() and state["steps"] == 0 and state["mask"].dtype == torch.bool
    for name in difference:
        assert state[name].dtype == dtype
        assert torch.allclose(state[name].double(), finetuned[name].double(), atol=4 * torch.finfo(dtype).eps)


def test_application_scales_is_partial_and_changes_nothing_in_place():
    pretrained = model(0)
    before = {name: tensor.clone() for name, tensor in pretrained.items()}
    state = apply(pretrained, {"bias": torch.ones(3)}, scale=0.5)
    assert torch.equal(state["bias"], pretrained["bias"] + 0.5)
    assert torch.equal(state["weight"], pretrained["weight"])
    for tensor in state.values():
        tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in pretrained.items())
    assert apply(pretrained, {"steps": torch.tensor([7])})["steps"] == 0


def test_narrow_models_are_updated_in_float32():
    start, step = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([2.0**-9])
    assert apply({"w": start}, {"w": step}, scale=3.0)["w"] == torch.tensor([1 + 2.0**-7])


@pytest.mark.parametrize(
    "broken, message",
    [
        (lambda: task_vector({"a": torch.ones(2)}, {"b": torch.ones(2)}), "differ in keys: 'a', 'b'"),
        (lambda: task_vector({"a": torch.ones(2)}, {"a": torch.ones(3)}), r"'a': .* \(2,\), .*\(3,\); leave heads"),
        (lambda: task_vector({"a": torch.ones(2)}, {"a": torch.ones(2).long()}), "'a': fine-tuned dtype"),
        (lambda: apply({"a": torch.ones(2)}, {"x.y": torch.ones(2)}), "the model lacks: 'x.y'"),
        (lambda: apply({"a": torch.ones(2)}, {"a": torch.ones(1)}), r"'a': update shape \(1,\)"),
        (lambda: apply({"a": torch.ones(2)}, {}, scale=float("nan")), "scale must be a finite number, got nan"),
    ],
)
def test_mismatches_name_the_key(broken, message):
    with pytest.raises(ValueError, match=message):
        broken()


def test_a_model_in_place_of_its_state_dict_is_one_line():
    model = torch.nn.Linear(2, 2)
    for both in ((model, model.state_dict()), (model.state_dict(), model)):
        with pytest.raises(TypeError, match=r"^expected a state dict, got Linear; .*model.state_dict\(\)$"):
            task_vector(*both)


GOOD = {"w": torch.ones(2, 2), "n": torch.tensor(3)}


@pytest.mark.parametrize(
    "task_vectors, error, message",
    [
        ([], ValueError, "empty list"),
        (GOOD, TypeError, "expected a list of task vectors, got dict"),
        ([GOOD, [1]], TypeError, "task vector 1 is no mapping"),
        ([GOOD, {"w": [1.0]}], TypeError, "task vector 1, 'w': expected a tensor, got list"),
        ([GOOD, {"v": torch.ones(2, 2)}], ValueError, "task vector 0 and task vector 1 .* 'v', 'w'"),
        ([GOOD, {"w": torch.ones(2, 2).int()}], ValueError, "task vector 0 and task vector 1 .* 'w'"),
        (
            [GOOD, GOOD, {"w": torch.ones(4)}],
            ValueError,
            r"'w': shape \(2, 2\) in task vector 0, \(4,\) in task vector 2",
        ),
        ([GOOD, {"w": torch.tensor([[1, float("nan")], [0, 0]])}], ValueError, "task vector 1, 'w': 1 entries are NaN"),
        ([{"w": torch.full((2, 2), float("inf"))}], ValueError, "task vector 0, 'w': 4 entries are NaN or infinite"),
    ],
)
def test_check_names_task_and_key(task_vectors, error, message):
    with pytest.raises(error, match=message):
        check(task_vectors)


def test_check_accepts_a_sum_that_overflows_and_labels_the_merged_update():
    big = {"w": torch.full((3, 3), 60000.0, dtype=torch.float16)}
    assert check([big, big]) == ["w"]
    assert check([GOOD], {"w": torch.ones(2, 2)}) == ["w"]
    with pytest.raises(ValueError, match=r"task vector 0 and the merged task vector differ .* 'v', 'w'"):
        check([GOOD], {"v": torch.ones(2, 2)})


def test_predicates_and_choices():
    treated = matrices_without("embedding")
    assert treated("mlp.weight", torch.ones(2, 2))
    assert not treated("token_embedding.weight", torch.ones(2, 2))
    assert not treated("conv.weight", torch.ones(2, 2, 1, 1)) and not treated("bias", torch.ones(2))
    assert matrices_without(conv=True)("conv.weight", torch.ones(2, 2, 1, 1))
    check_choice("space", "input", ("input", "output"))
    with pytest.raises(ValueError, match=r"unknown space 'ouput', .*did you mean 'output'"):
        check_choice("space", "ouput", ("input", "output"))
