"""A method built by hand and one built from an empty configuration have the same settings."""

import inspect

import pytest

from pretrain.config.defaults import get_defaults
from pretrain.methods import METHODS, method_class
from pretrain.methods.base import Run


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_is_configured_and_its_default_is_that_of_its_key(name, monkeypatch):
    chosen = method_class(name)
    parameters = inspect.signature(chosen.__init__).parameters
    passed = {}

    def record(self, *args, **kwargs):
        passed.update(kwargs)

    monkeypatch.setattr(chosen, "__init__", record)
    chosen.from_config(get_defaults(), Run(num_images=10**6, total_steps=9, bn_groups=1))
    settings = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert passed.keys() == settings.keys()
    defaults = {n: value for n, value in settings.items() if value is not inspect.Parameter.empty}
    assert defaults == {n: passed[n] for n in defaults}
