import numpy as np
import pytest
import torch

from penstock.engine.sampler import Sampler
from penstock.engine.sampling_params import SamplingParams
from penstock.engine.sequence import Sequence


def sequence(number=0, generated=0, **params):
    one = Sequence(number, None, (1, 2, 3), SamplingParams(**params), 100)
    one.output_ids.extend([0] * generated)
    return one


@pytest.fixture
def sampler():
    return Sampler(vocab_size=50, num_rows=2)


def logits(rows, seed=0):
    return torch.randn(rows, 50, generator=torch.Generator().manual_seed(seed))


def test_greedy_takes_the_likeliest(sampler):
    rows = logits(4)
    tokens = sampler.sample(rows, [sequence(temperature=0)] * 4)
    assert [token.id for token in tokens] == rows.argmax(-1).tolist()


def test_draws_do_not_depend_on_the_rest_of_the_batch(sampler):
    rows = logits(7)
    sequences = [sequence(number, number % 3, temperature=0.8 if number != 2 else 0, seed=5) for number in range(7)]
    together = [token.id for token in sampler.sample(rows, sequences)]
    alone = [sampler.sample(rows[n : n + 1], [sequences[n]])[0].id for n in range(7)]
    backwards = [token.id for token in sampler.sample(rows.flip(0), sequences[::-1])][::-1]
    assert together == alone == backwards


def test_seed_request_and_position_each_change_the_draw(sampler):
    row = torch.zeros(1, 50)
    base = sampler.sample(row, [sequence(1, 1, seed=1)])[0].id
    assert sampler.sample(row, [sequence(1, 1, seed=1)])[0].id == base
    for number, generated, seed in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        assert sampler.sample(row, [sequence(number, generated, seed=seed)])[0].id != base


def test_frequencies_follow_the_distribution(sampler):
    row = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    counts = np.zeros(4)
    for generated in range(2000):
        counts[sampler.sample(row, [sequence(0, generated, temperature=2.0)])[0].id] += 1
    expected = (row / 2.0).softmax(-1).numpy()[0] * 2000
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize(("params", "allowed"), [({"top_k": 3}, 3), ({"top_p": 0.2}, None), ({"top_k": 1}, 1)])
def test_truncation_keeps_only_the_likeliest(sampler, params, allowed):
    row = logits(1, seed=3)
    order = row[0].argsort(descending=True).tolist()
    if allowed is None:
        sums = row[0].softmax(-1).sort(descending=True).values.cumsum(0)
        allowed = int((sums < params["top_p"]).sum()) + 1
    drawn = {sampler.sample(row, [sequence(0, n, **params)])[0].id for n in range(300)}
    assert drawn == set(order[:allowed])


def test_logprobs_are_the_models_own_with_ranks(sampler):
    rows = logits(2, seed=9)
    greedy, drawn = sampler.sample(
        rows, [sequence(temperature=0, logprobs=3), sequence(1, temperature=5.0, logprobs=0)]
    )
    wanted = rows.log_softmax(-1)
    assert greedy.logprob == pytest.approx(float(wanted[0].max()))
    assert [entry.rank for entry in greedy.logprobs.values()] == [1, 2, 3]
    assert list(greedy.logprobs) == rows[0].topk(3).indices.tolist()
    assert list(drawn.logprobs) == [drawn.id]
    place = rows[1].argsort(descending=True).tolist().index(drawn.id) + 1
    assert drawn.logprobs[drawn.id].rank == place


def test_half_precision_logits_are_sampled_in_float32(sampler):
    rows = logits(3).bfloat16()
    assert len(sampler.sample(rows, [sequence(n, temperature=1.0) for n in range(3)])) == 3


def test_numbers_as_large_as_json_has_them(sampler):
    """One line of a batch job with such a number would else end the job, again and again."""
    sequences = [sequence(temperature=10**30, top_k=10**30), sequence(temperature=1e-320, logprobs=100)]
    drawn, cold = sampler.sample(logits(2), sequences)
    assert 0 <= drawn.id < 50
    assert cold.id == int(logits(2)[1].argmax())
    assert len(cold.logprobs) == 50
