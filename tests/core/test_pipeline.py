import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stackcomp as sc
from stackcomp.core.errors import SettingError, UnknownPass, UnknownSetting

GLOBS = st.none() | st.sampled_from(["encoder.*", ("a", "b.*"), "x'y"])
PASSES = st.one_of(
    st.builds(lambda only, skip: sc.Int8Weights(only=only, skip=skip), GLOBS, GLOBS),
    st.builds(lambda share: sc.MagnitudePrune(sparsity=share), st.floats(0, 0.99)),
    st.just(sc.MagnitudePrune(sparsity="2:4")),
)
PIPELINES = st.recursive(
    PASSES, lambda inner: st.lists(inner, max_size=3).map(lambda items: sc.Pipeline(*items)), max_leaves=6
)


@given(PIPELINES)
def test_a_pipeline_prints_to_python_and_reads_back(step):
    pipeline = step if isinstance(step, sc.Pipeline) else sc.Pipeline(step)
    assert sc.parse(repr(pipeline)) == pipeline
    assert hash(sc.parse(repr(pipeline))) == hash(pipeline)


def test_nesting_does_not_change_what_runs():
    one, two = sc.Int8Weights(), sc.MagnitudePrune(sparsity=0.3)
    assert sc.Pipeline(sc.Pipeline(one), two).flat() == sc.Pipeline(one, two).flat() == (one, two)
    assert len(sc.Pipeline(sc.Pipeline(one, two), one)) == 3


def test_a_pipeline_does_not_change():
    with pytest.raises(AttributeError, match="build another one"):
        sc.Pipeline().steps = ()


def test_text_is_read_and_never_run():
    with pytest.raises(SettingError, match="literals"):
        sc.parse("Int8Weights(only=print('ran'))")
    with pytest.raises(UnknownPass, match=r"'Int8Weight'.*Int8Weights"):
        sc.parse("Int8Weight()")
    for text in ("Int8Weights(", 3):
        with pytest.raises(SettingError, match="not a pipeline"):
            sc.parse(text)
    with pytest.raises(SettingError, match="without names"):
        sc.parse("Pipeline(x=Int8Weights())")
    with pytest.raises(SettingError, match="one by one"):
        sc.parse("Int8Weights(**{'only': 'a'})")


def test_a_misspelt_setting_is_refused_with_the_nearest():
    with pytest.raises(UnknownSetting, match=r"'sparsty'.*did you mean sparsity"):
        sc.MagnitudePrune(sparsty=0.5)
    with pytest.raises(UnknownSetting, match="by name"):
        sc.MagnitudePrune(0.5)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan"), True, None, "4:2", "2:4:8", "0:4", "2:128"])
def test_a_sparsity_out_of_range_names_itself(value):
    with pytest.raises(SettingError, match="sparsity="):
        sc.MagnitudePrune(sparsity=value)


@pytest.mark.parametrize("value", [3, (), ("a", 3)])
def test_globs_must_be_strings(value):
    with pytest.raises(SettingError, match="only="):
        sc.Int8Weights(only=value)


@pytest.mark.parametrize("value", [1, "yes"])
def test_a_switch_is_on_or_off(value):
    with pytest.raises(SettingError, match=r"bf16=.* is neither on nor off"):
        sc.FineTune(bf16=value)
    with pytest.raises(SettingError, match="bits="):
        sc.LowBitWeights(bits=True)


def test_numbers_of_numpy_become_those_of_python():
    item = sc.MagnitudePrune(sparsity=np.float64(0.25), block=(np.int64(2), 1))
    assert repr(item) == "MagnitudePrune(sparsity=0.25, block=(2, 1))"
    assert sc.parse(repr(sc.Pipeline(item))) == sc.Pipeline(item)
    assert sc.MagnitudePrune(sparsity=np.float32(0.25)).sparsity == 0.25


def test_what_is_no_pass_is_refused():
    with pytest.raises(SettingError, match="build the pass"):
        sc.Pipeline(sc.Int8Weights)
