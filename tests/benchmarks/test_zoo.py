"""40 model types of the zoo (`benchmarks/zoo.py` has all): every pass is right on them or refuses.

Each type meets three of the passes, and each pass some of the types.
"""

from __future__ import annotations

import copy
import warnings

import pytest

from support import script

TYPES = tuple(
    """
albert bart bert biogpt blenderbot bloom camembert cohere deberta deberta-v2 distilbert electra esm
falcon gemma gemma2 gpt2 gpt_bigcode gpt_neo gpt_neox llama m2m_100 marian mbart mistral mixtral
mpnet mpt mt5 olmo openai-gpt opt pegasus phi qwen2 qwen3 roberta stablelm t5 xglm
""".split()  # noqa: SIM905
)
EACH = 3


def test_there_are_forty() -> None:
    assert len(set(TYPES)) == 40
    assert set(TYPES) <= set(script("benchmarks/zoo.py").types())


@pytest.mark.parametrize("model_type", TYPES)
def test_passes_are_right_on_a_type_or_refuse_it(model_type: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old architectures
        zoo = script("benchmarks/zoo.py")
        model = zoo.build(model_type)
        assert not isinstance(model, str), model
        names = list(zoo.PASSES)
        first = TYPES.index(model_type) * EACH
        for name in (names[(first + more) % len(names)] for more in range(EACH)):
            found = zoo.judged(copy.deepcopy(model), zoo.PASSES[name])
            assert found[0] in ("right", "refused"), (name, found)
            assert found[0] == "right" or found[1]
