import pytest

from penstock import SamplingParams
from penstock.errors import ConfigError, UnsupportedFieldError


def test_defaults_are_vllms():
    params = SamplingParams()
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (16, 1.0, 1.0, 0)
    assert (params.seed, params.stop, params.ignore_eos, params.logprobs) == (None, (), False, None)
    assert not params.is_greedy


def test_fields_of_other_engines_are_refused_by_name():
    with pytest.raises(UnsupportedFieldError) as caught:
        SamplingParams(max_tokens=3, presence_penalty=0.5, n=2)
    assert "got n, presence_penalty" in str(caught.value)
    assert "max_tokens" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", True),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", [""]),
        ("stop", [3]),
        ("ignore_eos", 1),
        ("logprobs", -1),
        ("logprobs", 101),
    ],
)
def test_values_out_of_range_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"{field} is out of range"):
        SamplingParams(**{field: value})


def test_one_stop_string_is_a_list_of_one_and_minus_one_means_all():
    assert SamplingParams(stop="x").stop == ("x",)
    assert SamplingParams(top_k=-1).top_k == 0


def test_fields_over_defaults():
    defaults = SamplingParams(max_tokens=3, temperature=0)
    params = SamplingParams.from_mapping({"max_tokens": 9, "stop": ["a"]}, defaults=defaults)
    assert (params.max_tokens, params.temperature, params.stop) == (9, 0, ("a",))
    with pytest.raises(UnsupportedFieldError, match="best_of"):
        SamplingParams.from_mapping({"best_of": 2})
