"""Modalities that other packages bring into the world: what is refused. What works is tests/docs/test_ninth_modality.py."""

import pytest

from mmbridge.errors import ConfigError
from mmbridge.synthetic import CARRIES, register_renderer

WORDS = {"captions": ["{thing}"], "requests": ["What is it?"], "mentions": ["this"], "judge": dict}


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("smell", {"carries": ["shap"]}, "factor 'shap' is not known.*did you mean 'shape'"),
        ("smell", {"carries": []}, "'smell' needs at least one of carries"),
        ("smell", {"captions": []}, "'smell' needs at least one of carries, captions"),
        ("depth", {}, "the world has a modality 'depth' already"),
    ],
)
def test_what_is_refused(name, changes, reason):
    before = dict(CARRIES)
    with pytest.raises(ConfigError, match=reason):
        register_renderer(name, **{"carries": ["shape"], **WORDS, **changes})(lambda scene, seed: None)
    assert before == CARRIES
