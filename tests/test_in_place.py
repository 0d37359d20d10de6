"""Gradients of a vocabulary's weights that are added where they lie: the same numbers as autograd's, in one place."""

import pytest
import tiny
import torch
from test_ops import make_inputs, naive_statistics
from tolerances import close
from torch import nn

from fastppo import ops
from fastppo.models.in_place import GradientMemory, embeddings_in_place, place_of_gradient
from fastppo.ops import chunks

VOCABULARY = 37


@pytest.fixture(params=[4, 64], ids=["chunks of 4", "one chunk"])
def rows_of_a_chunk(request, monkeypatch):
    monkeypatch.setattr(chunks, "_MIN_CHUNK_ROWS", 1)
    monkeypatch.setattr(chunks, "_ROW_MULTIPLE", 1)
    monkeypatch.setitem(chunks._CHUNK_BYTES, "cpu", 4 * VOCABULARY * request.param)


def row_loss(logprobs, entropies, rows):
    return (torch.sin(logprobs) + 0.3 * entropies) * (rows + 1)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_heads_gradient_is_added_where_it_is_told_to(dtype, backend, rows_of_a_chunk):
    *ours, labels = make_inputs(dtype)
    exact = [part.detach().double().requires_grad_() for part in ours]
    logprobs, entropies, _ = naive_statistics(*exact, labels)
    row_loss(logprobs, entropies, torch.arange(len(labels))).sum().backward()
    before = torch.randn_like(ours[1])
    weight_grad = before.clone()
    version = weight_grad._version
    with ops.use_backend(backend):
        loss = ops.linear_loss(*ours[:2], labels, row_loss, bias=ours[2], weight_grad=weight_grad)
        (loss + 0 * ours[0].sum()).backward()
    assert ours[1].grad is None
    assert weight_grad._version > version  # by which an optimiser's step knows that something was added
    sums = (weight_grad, exact[1].grad + before.double())
    for mine, naive in (sums, (ours[0].grad, exact[0].grad), (ours[2].grad, exact[2].grad)):
        torch.testing.assert_close(mine.double(), naive, **close(dtype, 100 if dtype == torch.float64 else 8))


def test_a_factor_that_comes_too_late_is_refused():
    hidden, weight, bias, labels = make_inputs()
    place = torch.zeros_like(weight)
    loss = ops.linear_loss(hidden, weight, labels, row_loss, bias=bias, weight_grad=place)
    with pytest.raises(RuntimeError, match=r"multiplied by 0\.5 afterwards; multiply the weights of its rows"):
        (0.5 * loss).backward()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda weight: torch.zeros(weight.shape[::-1], dtype=weight.dtype),
        lambda weight: torch.zeros_like(weight, dtype=torch.float16),
        lambda weight: torch.zeros(weight.shape[::-1], dtype=weight.dtype).t(),
        lambda weight: torch.zeros_like(weight, requires_grad=True),
    ],
    ids=["shape", "dtype", "strides", "graph"],
)
def test_a_place_that_does_not_fit_is_refused(spoil):
    hidden, weight, bias, labels = make_inputs()
    with pytest.raises(ValueError, match=r"expected the weight's .* pass torch\.zeros_like\(weight\)"):
        ops.linear_loss(hidden, weight, labels, row_loss, bias=bias, weight_grad=spoil(weight.detach()))


def gradient_of_use(embedding, ids, is_in_place, times=2):
    """Return the gradient of `times` backward passes, in the weight's dtype."""
    embedding.weight.grad = None
    factors = torch.randn(*ids.shape, embedding.embedding_dim, generator=torch.Generator().manual_seed(3))
    for _ in range(times):
        if is_in_place:
            with embeddings_in_place(embedding), embeddings_in_place(embedding):
                rows = embedding(ids)
        else:
            rows = embedding(ids)
        (rows * factors.to(rows)).sum().backward()
    return embedding.weight.grad


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_of_an_embedding(dtype, padding_idx):
    ids = torch.tensor([[1, 2, 2, 5], [5, 5, 0, 8]])
    embedding = nn.Embedding(9, 3, padding_idx, dtype=dtype)
    expected = gradient_of_use(embedding, ids, is_in_place=False).clone()
    ours = gradient_of_use(embedding, ids, is_in_place=True)
    torch.testing.assert_close(ours, expected, **close(dtype, 4))
    assert ours[3].abs().sum() == 0
    assert "forward" not in vars(embedding)


def test_no_second_tensor_of_the_weights_size_is_made():
    embedding = nn.Embedding(1000, 4)
    embedding.weight.grad = torch.zeros_like(embedding.weight)
    place = embedding.weight.grad.data_ptr()
    made = []

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape == embedding.weight.shape:
                made.append(result.data_ptr())
            return result

    with embeddings_in_place(embedding), Shapes():
        embedding(torch.tensor([1, 7])).sum().backward()
    assert set(made) <= {place, embedding.weight.data_ptr()}


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


@pytest.mark.parametrize("kind", ["subclass", "max_norm", "by frequency", "frozen", "hooked", "later hooked"])
def test_what_does_more_than_look_up_is_left_to_autograd(kind):
    settings = {"max_norm": {"max_norm": 1.0}, "by frequency": {"scale_grad_by_freq": True}}.get(kind, {})
    embedding = (Scaled if kind == "subclass" else nn.Embedding)(9, 3, **settings)
    embedding.weight.requires_grad_(kind != "frozen")
    seen = []
    if kind == "hooked":
        embedding.weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    with embeddings_in_place(embedding):
        assert ("forward" in vars(embedding)) == (kind == "later hooked")
        rows = embedding(torch.tensor([1, 1, 4]))
    if kind == "later hooked":
        embedding.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    if kind != "frozen":
        rows.sum().backward()
        assert embedding.weight.grad[4].abs().sum() > 0
    assert len(seen) == ("hooked" in kind)
    assert all(torch.equal(gradient, embedding.weight.grad) for gradient in seen)


def test_the_gradient_of_a_weight_that_lies_transposed_does_too():
    embedding = nn.Embedding(9, 3)
    embedding.weight.data = embedding.weight.data.t().contiguous().t()
    assert place_of_gradient(embedding.weight) is None
    gradient = gradient_of_use(embedding, torch.tensor([1, 1, 4]), is_in_place=True, times=1)
    assert gradient.stride() == embedding.weight.stride()  # fused optimisers read both as they lie in memory


def test_a_tied_weight_gets_both_parts():
    model, ids = tiny.llama(tie=True), torch.tensor([[5, 6, 6, 7, 9]])
    labels = ids[0].roll(-1)
    logits = model(input_ids=ids).logits[0]
    nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    head = model.get_output_embeddings().weight
    with embeddings_in_place(model):
        hidden = model.model(input_ids=ids)[0][0]
        place = place_of_gradient(head)
        ops.linear_loss(hidden, head, labels, lambda logprobs, *_: -logprobs, weight_grad=place).backward()
    assert head.grad is place
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_gradients_lie_in_the_same_place_from_step_to_step():
    weights = [torch.randn(3, 4, requires_grad=True) for _ in range(3)]
    frozen = torch.randn(2)
    memory = GradientMemory([*weights, frozen])
    places = []
    for factor in (2.0, 5.0):
        memory.hand_out()
        (weights[0] * factor).sum().backward()
        (weights[1][0] * factor).sum().backward()
        memory.settle()
        assert weights[2].grad is None
        assert frozen.grad is None
        torch.testing.assert_close(weights[0].grad, torch.full((3, 4), factor))
        torch.testing.assert_close(weights[1].grad[0], torch.full((4,), factor))
        assert not weights[1].grad[1:].any()
        places.append([weight.grad.data_ptr() for weight in weights[:2]])
        for weight in weights:
            weight.grad = None
    assert places[0] == places[1]


def test_a_parameter_that_a_minibatch_does_not_reach_is_not_moved_by_its_momentum():
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer, memory = torch.optim.Adam(weights, lr=0.1), GradientMemory(weights)
    for reached in ((0, 1), (0,)):
        before = [weight.detach().clone() for weight in weights]
        memory.hand_out()
        for number in reached:
            weights[number].sum().backward()
        memory.settle()
        optimizer.step()
        optimizer.zero_grad()
        assert [not torch.equal(*pair) for pair in zip(before, weights, strict=True)] == [n in reached for n in (0, 1)]
