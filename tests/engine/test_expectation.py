"""How many tokens are expected, against what is known of the jobs."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.engine.expectation import STEPS, Expectation

counts = st.integers(1, 300).flatmap(lambda most: st.tuples(st.integers(1, most), st.just(most)))
running = st.integers(1, 300).flatmap(lambda most: st.tuples(st.integers(0, most - 1), st.just(most)))


def learned(finished):
    expectation = Expectation()
    for generated, most in finished:
        expectation.finished(generated, most=most)
    return expectation


@given(st.lists(counts), st.lists(running), st.lists(running, min_size=1))
def test_more_than_there_is_and_no_more_than_there_may_be(finished, others, asked):
    outlook = learned(finished).given(others)
    for generated, most in asked:
        assert generated < outlook.tokens(generated, most=most) <= most
        if not any(done < possible for done, possible in finished):
            assert outlook.tokens(generated, most=most) == most, "nobody has ended early"


@given(st.lists(counts, min_size=1), st.lists(running), running)
def test_those_that_still_run_speak_for_more(finished, others, asked):
    generated, most = asked
    known = learned(finished)
    assert known.given(others).tokens(generated, most=most) >= known.given([]).tokens(generated, most=most)


@pytest.mark.parametrize("most", [64, 100, 4096])
def test_it_learns_the_mean(most):
    """Lengths at random: the estimate is their mean, half a step and the one that is added more at most."""
    random = Random(0)
    lengths = [min(int(random.expovariate(4 / most)) + 1, most) for _ in range(2000)]
    outlook = learned((length, most) for length in lengths).given([])
    mean = sum(lengths) / len(lengths)
    assert mean <= outlook.tokens(0, most=most) <= mean + most / STEPS + 2
    half = [length for length in lengths if length > most // 2]
    assert outlook.tokens(most // 2, most=most) == pytest.approx(sum(half) / len(half), abs=2 * most / STEPS + 2)


def test_the_first_to_finish_do_not_stand_for_all():
    """Three of a hundred have ended at once, the others have come as far: only they are known to be short."""
    expectation = learned([(5, 1000)] * 3)
    assert expectation.given([(6, 1000)] * 97).tokens(0, most=1000) > 950
    assert expectation.given([]).tokens(0, most=1000) < 300
    assert expectation.given([]).tokens(100, most=1000) == 1000, "nobody has come so far"
